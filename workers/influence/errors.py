"""What can go wrong in the engine: a stable code and a sentence that says what to change."""

from collections.abc import Sequence
from typing import ClassVar

_MAX_NAMED = 10


class InfluenceError(Exception):
    """Base of the engine's errors; the message is written for the person who sent the audit."""

    code: ClassVar[str] = "influence_error"


class UnsupportedModule(InfluenceError):
    """A part of the model whose per-sample gradient this engine cannot give exactly."""

    code = "unsupported_module"


class NoTrackedModules(InfluenceError):
    """The model has no module whose gradients could be taken."""

    code = "no_tracked_modules"


class InsufficientMemory(InfluenceError):
    """Even the smallest batch, or the validation gradients alone, do not fit into memory."""

    code = "insufficient_memory"


class NonFiniteInfluence(InfluenceError):
    """A loss, gradient or influence is NaN or infinite.

    Args:
        what: what is not finite, such as "the loss".
        positions: the samples concerned, as positions in what the caller passed (a batch, say);
            kept as `positions`, so that the caller can translate them into sample indices.
    """

    code = "non_finite_influence"

    def __init__(self, what: str, *, positions: Sequence[int]) -> None:
        self.what = what
        self.positions = tuple(positions)
        named = ", ".join(str(position) for position in self.positions[:_MAX_NAMED])
        more = len(self.positions) - _MAX_NAMED
        super().__init__(
            f"{what} is not finite for the samples at {named}"
            + (f" and {more} more" if more > 0 else "")
            + "; run the model in float32, or check that its weights hold no NaN."
        )
