"""Which validation samples count when influence is aggregated.

Shapes: V validation samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValidationChoice:
    """Which validation samples count.

    Attributes:
        is_finite_V: whether loss and gradient are finite; the others are left out.
        is_correct_V: whether `correct_only` keeps them.
        class_V: their classes; NO_CLASS for a causal language model.
    """

    is_finite_V: Tensor
    is_correct_V: Tensor
    class_V: Tensor

    @classmethod
    def nothing(cls) -> "ValidationChoice":
        """Return the choice of an audit without a validation set."""
        none_V = torch.zeros(0, dtype=torch.bool)
        return cls(none_V, none_V, torch.zeros(0, dtype=torch.int64))
