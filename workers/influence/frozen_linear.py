"""Linear layers of a frozen model: nearly all the time of a pass is spent in their products.

The weights get no gradients, so a layer needs one product forwards and one backwards. On a CPU
oneDNN makes both in float32 faster than torch's own choice of a library (MKL; by 10 to 25 % on the
layers of a small encoder). Where only few positions are read, most rows of the gradient are zero: a
classifier reads one position of each sample, and a language model is judged by the tokens of its
completions only, so everything position-wise in the last block has none at the other positions.

Shapes: N rows (batch times sequence), I/O input and output features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.influence.layers import is_elsewhere

_DENSE_SHARE = 0.5


class FrozenLayers:
    """The plain linear layers and Conv1D of a frozen model, made to work as said above.

    Args:
        model: its weights are frozen; subclasses of linear layers are left alone.
        last_block: whose layers leave out the rows that are zero.
    """

    def __init__(self, model: nn.Module, *, last_block: nn.Module) -> None:
        in_last_block = set(last_block.modules())
        self._is_halved = False
        self._half: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        for module in model.modules():
            is_transposed = type(module).__name__ == "Conv1D"
            if is_elsewhere(module):
                continue
            if type(module) is nn.Linear or is_transposed:
                module.forward = partial(
                    self._forward,
                    module,
                    is_transposed=is_transposed,
                    skips_zero_rows=module in in_last_block,
                )

    @contextmanager
    def in_bfloat16(self) -> Iterator[None]:
        """Make the products alone in bfloat16, everything between them as the model does.

        For forward passes without gradients. The weights are kept in bfloat16 from now on, too.
        """
        self._is_halved = True
        try:
            yield
        finally:
            self._is_halved = False

    def _forward(
        self, module: nn.Module, x: Tensor, *, is_transposed: bool, skips_zero_rows: bool
    ) -> Tensor:
        weight_OI: Any = module.weight.T if is_transposed else module.weight
        bias_O: Any = module.bias
        if self._is_halved:
            if module not in self._half:
                self._half[module] = (
                    weight_OI.bfloat16(),
                    None if bias_O is None else bias_O.bfloat16(),
                )
            return nn.functional.linear(x.bfloat16(), *self._half[module]).to(x.dtype)
        x_NI = x.reshape(-1, x.shape[-1])
        result_NO: Tensor = _FrozenLinear.apply(x_NI, weight_OI, bias_O, skips_zero_rows)  # type: ignore[no-untyped-call]
        # a view made out here: models write to outputs in place, which autograd forbids to views
        # that were made inside
        return result_NO.view(*x.shape[:-1], len(weight_OI))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        skips_zero_rows: bool,  # noqa: FBT001 - autograd passes by position
    ) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.skips_zero_rows = skips_zero_rows
        return _product(x_NI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (weight_OI,) = ctx.saved_tensors
        (gradient_NO,) = gradients
        if ctx.skips_zero_rows:
            rows = gradient_NO.any(dim=1).nonzero().flatten()
            if len(rows) <= _DENSE_SHARE * len(gradient_NO):
                result_NI = gradient_NO.new_zeros(len(gradient_NO), weight_OI.shape[1])
                result_NI[rows] = _product(gradient_NO[rows], weight_OI.T, None)
                return result_NI, None, None, None
        return _product(gradient_NO, weight_OI.T, None), None, None, None


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if _HAS_ONEDNN and x_NI.device.type == "cpu" and x_NI.dtype == torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 - has no public name
            x_NI, weight_OI, bias_O, "none", [], ""
        )
        return product
    return nn.functional.linear(x_NI, weight_OI, bias_O)


def _has_onednn() -> bool:
    # a build of torch without it, or with another signature, computes the same by `linear`
    try:
        torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            torch.zeros(1, 1), torch.zeros(1, 1), None, "none", [], ""
        )
    except (AttributeError, RuntimeError):
        return False
    return True


_HAS_ONEDNN = _has_onednn()
