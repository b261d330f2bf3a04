"""Where a model reads a sample, and the hidden states of the blocks there.

A bidirectional model reads the first token, a causal one the last: which of the two a model is
shows in what its first token knows of the others.

Shapes: B batch, S sequence, H hidden size, L blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.influence.capture import captured
from workers.influence.errors import UnsupportedModule
from workers.influence.layers import device_of, find_word_embedding

_NUM_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """What two forward passes with made-up tokens tell.

    Attributes:
        is_causal: the first token knows nothing of the later ones.
        pooled_names: modules that see one position of a sample, not its sequence.
    """

    is_causal: bool
    pooled_names: frozenset[str]


def probe(model: nn.Module, *, block_name: str, names: Sequence[str]) -> Probe:
    """Run a model on two made-up samples that only have their first token in common.

    Args:
        model: in evaluation mode.
        block_name: a transformer block; the last one knows most.
        names: modules to look at.

    Raises:
        UnsupportedModule: one of them sees something else than a batch of samples, such as the
            sequence first, or all tokens in a row.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or find_word_embedding(model)[1].num_embeddings
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(vocabulary, (2, _NUM_TOKENS), generator=generator).to(device)
    ids_BS[1, 0] = ids_BS[0, 0]
    axes: dict[str, set[int]] = {name: set() for name in names}
    first = torch.zeros(1, device=device, dtype=torch.int64)
    states = []
    modules = {name: model.get_submodule(name) for name in names}
    for ids_S in ids_BS:
        inputs = {"input_ids": ids_S[None], "attention_mask": torch.ones_like(ids_S)[None]}
        block = {block_name: model.get_submodule(block_name)}
        with torch.no_grad(), captured(modules) as captures, hidden_states(block, first) as hidden:
            model(**inputs)
        states.append(hidden[block_name][0])
        for name, uses in captures.items():
            axes[name] |= {use.y.dim() for use in uses}
            for use in uses:
                if len(use.y) != 1:
                    raise UnsupportedModule(
                        f"module '{name}' sees an input of shape {tuple(use.x.shape)} for one "
                        f"sample of {_NUM_TOKENS} tokens, not [batch 1, sequence {_NUM_TOKENS}, "
                        "features] or [batch, features]; leave it out of the target modules."
                    )
    distance = float((states[0] - states[1]).norm() / states[0].norm().clamp(min=1e-30))
    rounding = torch.finfo(next(model.parameters()).dtype).eps
    return Probe(
        is_causal=distance <= max(1e-5, 4 * rounding),
        pooled_names=frozenset(name for name, seen in axes.items() if seen == {2}),
    )


def reading_position(mask_BS: Tensor, *, is_causal: bool) -> Tensor:
    """Return the position of every sample's last (causal) or first token, int64 [B].

    Padding may stand on either side.
    """
    mask_BS = mask_BS.ne(0).long()
    if is_causal:
        return mask_BS.shape[1] - 1 - mask_BS.flip(1).argmax(dim=1)
    return mask_BS.argmax(dim=1)


@contextmanager
def hidden_states(
    blocks: Mapping[str, nn.Module], position_B: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Keep the output [B, H], float32, of every block at every sample's reading position.

    A block that is used several times (weights shared over the depth) keeps its last output.

    Raises:
        UnsupportedModule: a block gives no [batch, sequence, hidden size].
    """
    states: dict[str, Tensor] = {}
    index_B = torch.arange(len(position_B), device=position_B.device)

    def hook_for(name: str) -> Any:  # noqa: ANN401 - the type of a hook is torch's own business
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            state = output if isinstance(output, Tensor) else output[0]
            if not isinstance(state, Tensor) or state.dim() != 3:  # noqa: PLR2004 - as said above
                raise UnsupportedModule(
                    f"block '{name}' gives no hidden states of [batch, sequence, features]."
                )
            states[name] = state.detach().to(index_B.device)[index_B, position_B].float()

        return hook

    with ExitStack() as handles:
        for name, block in blocks.items():
            handle = block.register_forward_hook(hook_for(name))
            handles.callback(handle.remove)
        yield states
