"""Activation checkpointing: a block keeps its input and computes the rest again on the way back.

The forward pass of every block runs twice, so a pass takes about a third more time; what is held at
once falls from the activations of all blocks to those of one. Every number stays the same, to the
bit: the same operations run on the same values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_is_recomputing: ContextVar[bool] = ContextVar("_is_recomputing", default=False)


def is_recomputing() -> bool:
    """Tell hooks inside a block that it runs for the second time: they have seen it already."""
    return _is_recomputing.get()


def recompute_blocks(model: nn.Module, block_names: Sequence[str]) -> None:
    """Let the blocks of a model keep nothing but their inputs where gradients are wanted."""
    for name in block_names:
        block: Any = model.get_submodule(name)
        block.forward = partial(_forward, block.forward)


def _forward(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_contexts, **options)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _recomputing()


@contextmanager
def _recomputing() -> Iterator[None]:
    # set where the recomputation runs: on a GPU the backward pass has a thread of its own
    token = _is_recomputing.set(True)
    try:
        yield
    finally:
        _is_recomputing.reset(token)
