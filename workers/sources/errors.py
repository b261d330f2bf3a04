"""Why a model or a dataset could not be had."""

from typing import Literal

SourceErrorCode = Literal[
    "invalid_reference",
    "not_found",
    "not_permitted",
    "hub_unreachable",
    "hub_error",
    "source_unreachable",
    "source_error",
    "too_large",
    "storage_full",
    "missing_file",
    "changed_file",
    "unsafe_file",
    "unreadable_file",
    "unsupported_model",
    "unsupported_adapter",
    "untrained_head",
    "labels_mismatch",
    "unsupported_dataset",
]
SourceField = Literal["model", "adapter", "dataset"]


class SourceError(Exception):
    """A reference that leads to nothing usable; the message says what to change.

    Attributes:
        code: stable, for programs.
        field: which reference it is about; a caller with several datasets knows which one.
        transient: whether trying again later can help (the hub was down).
    """

    def __init__(
        self,
        message: str,
        *,
        code: SourceErrorCode,
        field: SourceField,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code: SourceErrorCode = code
        self.field: SourceField = field
        self.transient = transient
