"""Skip the rows of a backward pass that are zero anyway.

A classifier reads one position of each sample, so the gradient of everything position-wise in the
last block is zero at all other positions; autograd would multiply the zeros.

Shapes: N rows (batch times sequence), I/O input and output features.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_DENSE_SHARE = 0.5


class _RowSparseLinear(torch.autograd.Function):
    """A frozen linear layer whose backward pass multiplies only the rows that are not zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight_OI)
        return linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (weight_OI,) = ctx.saved_tensors
        (gradient,) = gradients
        gradient_NO = gradient.flatten(0, -2)
        rows = gradient_NO.any(dim=1).nonzero().flatten()
        if len(rows) > _DENSE_SHARE * len(gradient_NO):
            return gradient @ weight_OI, None, None
        result_NI = gradient_NO.new_zeros(len(gradient_NO), weight_OI.shape[1])
        result_NI[rows] = gradient_NO[rows] @ weight_OI
        return result_NI.view(*gradient.shape[:-1], -1), None, None


def skip_zero_rows(block: nn.Module) -> None:
    """Make every plain linear layer of a frozen block skip zero rows in its backward pass."""
    for module in block.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    result: Tensor = _RowSparseLinear.apply(x, module.weight, module.bias)
    return result
