"""Capture inputs and outputs of modules in a forward pass, and lay them out by sample.

Shapes: B batch, S sequence or positions, I/O input and output features.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.influence.errors import UnsupportedModule
from workers.influence.recomputing import is_recomputing


@dataclass(frozen=True, slots=True)
class Capture:
    """Input and output of one use of a module, with their versions to notice writes in place."""

    x: Tensor
    y: Tensor
    versions: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a module, laid out by sample.

    Attributes:
        x_BSI: the input, float32; int64 token ids [B, S] for an embedding.
        y_BSO: the output, in the model's precision.
        gradient_BSO: float32, gradient of every sample's own loss by the output.
        mask_BS1: float32, 1 where there is a token, 0 at padding.
    """

    x_BSI: Tensor
    y_BSO: Tensor
    gradient_BSO: Tensor
    mask_BS1: Tensor


@contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Capture]]]:
    """Capture every use of `modules` in order; the hooks are removed in any case.

    Raises:
        UnsupportedModule: a module is called with more than one input, or gives no tensor.
    """
    captures: dict[str, list[Capture]] = {name: [] for name in modules}

    def hook_for(name: str) -> Any:  # noqa: ANN401 - the type of a hook is torch's own business
        def hook(
            _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object
        ) -> None:
            inputs = [each for each in (*arguments, *keywords.values()) if each is not None]
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
                raise UnsupportedModule(
                    f"module '{name}' is called with {len(inputs)} inputs, not with one tensor; "
                    "leave it out of the target modules."
                )
            if not isinstance(output, Tensor):
                raise UnsupportedModule(
                    f"module '{name}' returns a {type(output).__name__}, not a tensor; "
                    "leave it out of the target modules."
                )
            if torch.is_grad_enabled() and not output.requires_grad:
                # nothing below is tracked: the graph starts here, and so ends the backward pass
                output.requires_grad_()
            if is_recomputing():
                return
            x = inputs[0].detach()
            captures[name].append(Capture(x, output, _versions(x, output)))

        return hook

    with ExitStack() as handles:
        for name, module in modules.items():
            handle = module.register_forward_hook(hook_for(name), with_kwargs=True)
            handles.callback(handle.remove)
        yield captures


def _versions(x: Tensor, y: Tensor) -> tuple[int, int]:
    # torch's own count of writes in place, which autograd relies on as well
    return x._version, y._version  # noqa: SLF001


def lay_out(
    name: str,
    capture: Capture,
    gradient: Tensor,
    mask_BS: Tensor,
    *,
    is_pooled: bool = False,
    scale_B: Tensor | None = None,
) -> Use:
    """Bring one use of the module `name` into the form [batch, positions, features].

    A use after pooling has one position. A use with more axes, such as a norm over every attention
    head on its own, [B, S, heads, I] or [B, heads, S, I], has a position for each of them. A use
    with another number of positions than the sequence, such as a head that only reads some, counts
    those with a gradient.

    Args:
        name: path of the module, for messages.
        capture: what was captured.
        gradient: gradient of the batch's loss by the output.
        mask_BS: nonzero where there is a token.
        is_pooled: the module sees one position of every sample; without it, rows without a
            sequence may be the tokens of an expert, or all tokens of the batch.
        scale_B: what the samples' losses were multiplied with; None if with nothing.

    Raises:
        UnsupportedModule: the values were overwritten since, or are no batch of samples.
    """
    if _versions(capture.x, capture.y) != capture.versions:
        raise UnsupportedModule(
            f"the model overwrites the input or output of module '{name}' in place; "
            "leave it out of the target modules."
        )
    # the layers of a large model may stand on several devices
    device = mask_BS.device
    x, y, gradient = capture.x.to(device), capture.y.detach().to(device), gradient.to(device)
    leading, expected = tuple(y.shape[:-1]), tuple(mask_BS.shape)
    if (
        leading[:1] != expected[:1]
        or tuple(x.shape[: len(leading)]) != leading
        or (len(leading) == 1) != is_pooled
    ):
        raise UnsupportedModule(
            f"module '{name}' sees an input of shape {tuple(x.shape)}, which is not "
            f"[batch {expected[0]}, sequence {expected[1]}, features] or "
            "[batch, features]; leave it out of the target modules."
        )
    x = x.float() if x.is_floating_point() else x
    gradient = gradient.float()
    if scale_B is not None:
        gradient = gradient / scale_B.view(-1, *[1] * (gradient.dim() - 1))
    if len(leading) == 1:  # after pooling: one position, which is no padding
        return Use(x[:, None], y[:, None], gradient[:, None], gradient.new_ones(len(x), 1, 1))
    if leading == expected:
        return Use(x, y, gradient, mask_BS[..., None].float())
    if len(leading) == 2:  # noqa: PLR2004 - batch and positions
        return Use(x, y, gradient, gradient.any(dim=-1, keepdim=True).float())
    axis = 1 if leading[1] == expected[1] else 2
    if len(leading) == 3 and leading[axis] == expected[1]:  # noqa: PLR2004 - the axes said above
        mask_BSh = mask_BS.unsqueeze(3 - axis).expand(leading)
        mask_BS1 = mask_BSh.flatten(1)[..., None].float()
    else:
        mask_BS1 = gradient.flatten(1, -2).any(dim=-1, keepdim=True).float()
    return Use(x.flatten(1, -2), y.flatten(1, -2), gradient.flatten(1, -2), mask_BS1)
