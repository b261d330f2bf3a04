"""Skip the rows of a backward pass that are zero anyway.

A classifier reads one position of each sample and a language model is judged by the tokens of its
completions only, so the gradient of everything position-wise in the last block is zero at all other
positions; autograd would multiply the zeros.

Shapes: N rows (batch times sequence), I/O input and output features.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_DENSE_SHARE = 0.5


class _RowSparseLinear(torch.autograd.Function):
    """A frozen linear layer whose backward pass multiplies only the rows that are not zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight_OI)
        # into a tensor of its own: autograd forbids writes in place to a view, which models do
        result = x.new_empty(*x.shape[:-1], len(weight_OI))
        result_NO = result.view(-1, len(weight_OI))
        if bias_O is None:
            torch.mm(x.flatten(0, -2), weight_OI.T, out=result_NO)
        else:
            torch.addmm(bias_O, x.flatten(0, -2), weight_OI.T, out=result_NO)
        return result

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
    """Make every plain linear layer and Conv1D of a frozen block skip zero rows backwards."""
    for module in block.modules():
        is_transposed = type(module).__name__ == "Conv1D"
        if type(module) is nn.Linear or is_transposed:
            forward = partial(_forward, module, is_transposed=is_transposed)
            module.forward = forward


def _forward(module: nn.Module, x: Tensor, *, is_transposed: bool) -> Tensor:
    weight_OI: Any = module.weight.T if is_transposed else module.weight
    result: Tensor = _RowSparseLinear.apply(x, weight_OI, module.bias)  # type: ignore[no-untyped-call]
    return result
