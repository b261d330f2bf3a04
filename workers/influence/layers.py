"""Where a model's modules stand: transformer blocks, head, word embeddings, and groups of them.

Everything is read off the module tree, nothing off a list of model families.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from torch import nn

from workers.influence.errors import UnsupportedModule

_NUM_BANDS = 4


class Part(StrEnum):
    """The part of the model that a module stands in."""

    WORD_EMBEDDING = "word_embedding"
    ATTENTION = "attention"
    """Inside a transformer block; METHOD's "attention layers" are whole blocks."""
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One parameter tensor with per-sample gradients.

    Attributes:
        name: path in the model, such as `bert.encoder.layer.0.attention.self.query.lora_A`.
        layer: index of the transformer block, None outside the blocks.
        part: the part of the model.
        num_parameters: entries of the tensor, d in METHOD's formulas.
        shape: shape of the tensor; a gradient row is the row-major flattening of it.
    """

    name: str
    layer: int | None
    part: Part
    num_parameters: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockStack:
    """The transformer blocks of a model and what the module tree holds after them.

    Attributes:
        name: path of the `nn.ModuleList`, such as `bert.encoder.layer`.
        num_blocks: its length.
        later_names: paths of all modules that are registered after the blocks.
    """

    name: str
    num_blocks: int
    later_names: frozenset[str]

    def locate(self, name: str) -> tuple[int | None, Part]:
        """Return the block index and the part of the model that the module `name` stands in.

        Raises:
            UnsupportedModule: it stands before the blocks or in a second stack of blocks.
        """
        if name.startswith(f"{self.name}."):
            return int(name.removeprefix(f"{self.name}.").split(".")[0]), Part.ATTENTION
        if name in self.later_names:
            return None, Part.HEAD
        raise UnsupportedModule(
            f"module '{name}' stands before the transformer blocks ('{self.name}'); leave it out "
            "of the adapter's target modules: only blocks and the classification head are audited."
        )


def find_block_stack(model: nn.Module) -> BlockStack:
    """Find the transformer blocks: the largest `nn.ModuleList` whose children share one type.

    Size is the number of parameters, so that the experts inside a block never win over the blocks.

    Raises:
        UnsupportedModule: the model has no such list.
    """
    stacks = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    if not stacks:
        raise UnsupportedModule(
            "the model has no list of transformer blocks; use a Transformers sequence classifier."
        )
    name = max(stacks, key=stacks.__getitem__)
    names = [other for other, _ in model.named_modules()]
    last = max(index for index, other in enumerate(names) if other.startswith(f"{name}."))
    num_blocks = len(list(model.get_submodule(name).children()))
    return BlockStack(name=name, num_blocks=num_blocks, later_names=frozenset(names[last + 1 :]))


def find_head(model: nn.Module, stack: BlockStack) -> list[str]:
    """Name the linear layers of the classification head, in the order of the module tree.

    The head is what the classifier adds after its backbone: linear layers that follow the blocks
    and stand outside the top-level child that holds them (so BERT's pooler is no part of it).
    """
    backbone = stack.name.split(".")[0]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name in stack.later_names
        and not name.startswith(f"{backbone}.")
    ]


def layer_groups(modules: Sequence[ModuleSpec]) -> dict[str, tuple[int, ...]]:
    """Group modules by depth: `all`, `WE`, four bands of blocks, `CL`.

    The bands are nearly equal quarters of the blocks that have modules, the earlier ones larger
    (6 blocks: 2, 2, 1, 1), named by first and last block (`00-01`, a single one `04`). Fewer than
    four blocks make one band each. Groups without modules are left out.

    Returns:
        Positions in `modules`, by group name.
    """
    layers = sorted({spec.layer for spec in modules if spec.layer is not None})
    num_bands = min(_NUM_BANDS, len(layers))
    quotient, remainder = divmod(len(layers), num_bands) if num_bands else (0, 0)
    starts = [band * quotient + min(band, remainder) for band in range(num_bands + 1)]

    groups = {"all": tuple(range(len(modules)))}
    groups["WE"] = _positions(modules, part=Part.WORD_EMBEDDING)
    for start, stop in pairwise(starts):
        band = layers[start:stop]
        first, last = f"{band[0]:02d}", f"{band[-1]:02d}"
        groups[first if first == last else f"{first}-{last}"] = tuple(
            index for index, spec in enumerate(modules) if spec.layer in band
        )
    groups["CL"] = _positions(modules, part=Part.HEAD)
    return {name: indices for name, indices in groups.items() if indices}


def _positions(modules: Sequence[ModuleSpec], *, part: Part) -> tuple[int, ...]:
    return tuple(index for index, spec in enumerate(modules) if spec.part is part)
