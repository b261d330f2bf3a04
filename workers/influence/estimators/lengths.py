"""Division by lengths that may be zero."""

from torch import Tensor


def reciprocal(norm: Tensor) -> Tensor:
    """Return 1 / norm, and 0 where the norm is 0."""
    return norm.reciprocal().masked_fill(norm == 0, 0.0)
