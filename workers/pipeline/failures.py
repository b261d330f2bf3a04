"""From an exception to what the user reads: a stable code, and a sentence on what to change."""

import torch

from app.datasets.files import DatasetError
from app.references import InvalidReference
from app.work.claims import Failure
from workers.influence.errors import InfluenceError
from workers.sources.errors import SourceError

INTERNAL_ERROR = "internal_error"
# which of two datasets an error is about, only the stage that read them knows
_FIELDS_OF_SOURCES = {"model": "model.reference", "adapter": "model.adapter"}


class AuditRefused(Exception):
    """The audit cannot be done as it was asked for.

    Args:
        code: stable, for programs.
        message: what to change, for people.
        field: the field of the request, dotted.
        transient: whether trying again later can help.
    """

    def __init__(
        self, code: str, message: str, *, field: str | None = None, transient: bool = False
    ) -> None:
        super().__init__(message)
        self.failure = Failure(code, message, field)
        self.transient = transient


def failure_of(error: Exception) -> Failure:
    """Return what the audit's row says about an error, in whole sentences."""
    failure = _failure_of(error)
    if failure.message.endswith("."):
        return failure
    return Failure(failure.code, f"{failure.message}.", failure.field)


def _failure_of(error: Exception) -> Failure:
    match error:
        case AuditRefused():
            return error.failure
        case SourceError() | DatasetError():
            return Failure(error.code, error.message, _FIELDS_OF_SOURCES.get(error.field or ""))
        case InvalidReference():
            return Failure("invalid_reference", str(error))
        case InfluenceError():
            return Failure(error.code, str(error))
        case _ if is_out_of_memory(error):
            return Failure(
                "out_of_memory",
                "The worker ran out of memory with the smallest batch. Lower max_tokens or "
                "fine_tune.batch_size, use fewer validation samples or target modules, or a "
                "worker with more memory.",
                "max_tokens",
            )
        case _:
            return Failure(INTERNAL_ERROR, f"{type(error).__name__}: {error}"[:500])


def is_worth_retrying(error: Exception) -> bool:
    """Return whether time can heal an error: what is wrong with the request stays wrong."""
    match error:
        case SourceError() | AuditRefused():
            return error.transient
        case DatasetError() | InvalidReference() | InfluenceError():
            return False
        case _:
            return not is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or the machine, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
