"""Leave out what the last block computes at positions that nobody reads.

A bidirectional classifier reads the first position of each sample. Whatever its last block does
position by position (queries, output projection, feed-forward layers) matters there alone; keys and
values matter everywhere. Which layers are which is not read off names but tried: a layer is narrow
when other values at the unread positions leave the logits as they are, to the bit.

Shapes: B batch, S sequence, I/O input and output features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.influence.layers import device_of, is_elsewhere

_NUM_TOKENS = 6


class _NarrowLinear(torch.autograd.Function):
    """A frozen linear layer at the first position of each sample; zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight_OI)
        result_BSO = x_BSI.new_zeros(*x_BSI.shape[:-1], len(weight_OI))
        result_BSO[:, 0] = nn.functional.linear(x_BSI[:, 0], weight_OI, bias_O)
        return result_BSO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (weight_OI,) = ctx.saved_tensors
        (gradient_BSO,) = gradients
        result_BSI = gradient_BSO.new_zeros(*gradient_BSO.shape[:-1], weight_OI.shape[1])
        result_BSI[:, 0] = gradient_BSO[:, 0] @ weight_OI
        return result_BSI, None, None


class NarrowLayers:
    """The layers of a frozen model's last block that matter at the first position alone.

    While `in_use` they compute nothing else: the logits and all gradients stay the same, the
    outputs of these layers at other positions do not. So it is not for what looks at those, such
    as sums over all tokens.

    Args:
        model: a bidirectional classifier in evaluation mode.
        block: its last transformer block.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        layers = [
            module
            for module in block.modules()
            if type(module) is nn.Linear and not is_elsewhere(module)
        ]
        expected = _logits(model)
        narrow = [layer for layer in layers if torch.equal(_logits(model, [layer]), expected)]
        # together they must not matter either; where they do, none is left out
        is_sound = torch.equal(_logits(model, narrow), expected)
        self._layers = narrow if is_sound else []
        self._is_in_use = False
        for layer in self._layers:
            narrowed: Any = layer
            narrowed.forward = partial(self._forward, layer, layer.forward)

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the layers compute the first position only."""
        self._is_in_use = True
        try:
            yield
        finally:
            self._is_in_use = False

    def _forward(self, layer: nn.Linear, whole: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        if not self._is_in_use or x.dim() != 3:  # noqa: PLR2004 - batch, sequence, features
            result: Tensor = whole(x)
            return result
        narrow: Tensor = _NarrowLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return narrow


def _logits(model: nn.Module, disturbed: Sequence[nn.Module] = ()) -> Tensor:
    """Run the model on made-up samples, some layers' outputs replaced but at the first position."""
    device = device_of(model)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", _NUM_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(vocabulary, (2, _NUM_TOKENS), generator=generator).to(device)

    def disturb(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        changed = torch.ones_like(output)
        changed[:, 0] = output[:, 0]
        return changed

    handles = [layer.register_forward_hook(disturb) for layer in disturbed]
    try:
        with torch.no_grad():
            classifier: Any = model
            result: Tensor = classifier(
                input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS)
            ).logits
        return result
    finally:
        for handle in handles:
            handle.remove()
