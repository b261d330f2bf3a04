"""Where a model's modules stand: transformer blocks, head, word embeddings, and groups of them.

Everything is read off the module tree, nothing off a list of model families.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from workers.influence.errors import NoTrackedModules, UnsupportedModule

ALL_LINEAR = "all-linear"
"""The target that stands for every linear layer of the blocks."""

Form = Literal["dense", "factored", "projected", "sparse"]
"""How the gradients of a module are kept, see `workers.influence.rows`."""

_NUM_BANDS = 4


class Part(StrEnum):
    """The part of the model that a module stands in."""

    WORD_EMBEDDING = "word_embedding"
    ATTENTION = "attention"
    """Inside a transformer block; METHOD's "attention layers" are whole blocks."""
    HEAD = "head"
    """After the blocks."""
    OTHER = "other"
    """Before the blocks, or in a second stack of them: in no group but `all`."""


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One parameter tensor with per-sample gradients.

    Attributes:
        name: path in the model, such as `bert.encoder.layer.0.attention.self.query.lora_A`.
        layer: index of the transformer block, None outside the blocks.
        part: the part of the model.
        num_parameters: entries of a gradient row, d in METHOD's formulas: those of the tensor, or
            of its projection.
        shape: shape of the tensor (of its projection); a gradient row is the row-major flattening
            of it.
        form: how its gradients are kept.
    """

    name: str
    layer: int | None
    part: Part
    num_parameters: int
    shape: tuple[int, ...]
    form: Form = "dense"


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

    @property
    def block_names(self) -> tuple[str, ...]:
        """Paths of the blocks, from the input to the output."""
        return tuple(f"{self.name}.{index}" for index in range(self.num_blocks))

    def locate(self, name: str) -> tuple[int | None, Part]:
        """Return the block index and the part of the model that the module `name` stands in."""
        if name.startswith(f"{self.name}."):
            return int(name.removeprefix(f"{self.name}.").split(".")[0]), Part.ATTENTION
        return None, Part.HEAD if name in self.later_names else Part.OTHER


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
            "the model has no list of transformer blocks; use a Transformers sequence classifier "
            "or causal language model."
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


def find_word_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    """Return the path of the input embedding of the tokens, and the module.

    Raises:
        UnsupportedModule: the model has none, or its embedding is of another type.
    """
    tree: Any = model
    embedding = tree.get_input_embeddings() if hasattr(tree, "get_input_embeddings") else None
    for name, module in model.named_modules():
        if module is embedding or (embedding is None and isinstance(module, nn.Embedding)):
            if isinstance(module, nn.Embedding):
                return name, module
            raise UnsupportedModule(
                f"module '{name}', the word embedding, is a {type(module).__name__}; "
                "only nn.Embedding is audited."
            )
    raise UnsupportedModule("the model has no word embedding (nn.Embedding).")


def find_targets(model: nn.Module, stack: BlockStack, targets: Sequence[str]) -> list[str]:
    """Name the modules that `targets` stand for, in the order of the module tree.

    A target is the whole path of a module, or the last part of the names of modules inside the
    blocks; one that names nothing there is looked for outside the blocks (`lm_head`), and
    `all-linear` names every linear layer of the blocks.

    Raises:
        NoTrackedModules: a target names nothing.
    """
    inside = {
        name: module for name, module in model.named_modules() if name.startswith(f"{stack.name}.")
    }
    linear_names = [name for name, module in inside.items() if is_linear_like(module)]
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            found = linear_names
        else:
            found = [name for name in inside if _is_named(name, target)]
            found = found or [name for name, _ in model.named_modules() if _is_named(name, target)]
        # some blocks have nn.Identity in the place of a norm
        found = [name for name in found if _has_parameters(model.get_submodule(name))] or found
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linear_names})
            raise NoTrackedModules(
                f"no layer of the transformer blocks is named {target}; "
                f"the linear layers there are: {', '.join(known)}."
            )
        chosen.update(found)
    return [name for name, _ in model.named_modules() if name in chosen]


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or GPT-2's, which is called Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_elsewhere(module: nn.Module) -> bool:
    """Whether a layer's weights are brought to it only while it runs, from memory or from disk."""
    return hasattr(module, "_hf_hook") and any(
        weight.is_meta for weight in module.parameters(recurse=False)
    )


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: where its first weights are that lie on a device."""
    devices = [parameter.device for parameter in model.parameters() if not parameter.is_meta]
    return devices[0] if devices else next(model.parameters()).device


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def layer_groups(modules: Sequence[ModuleSpec]) -> dict[str, tuple[int, ...]]:
    """Group modules by depth: `all`, `WE`, four bands of blocks, `CL`.

    The word embedding stands in `WE` alone: `all` is all other modules. The bands are nearly equal
    quarters of the blocks that have modules, the earlier ones larger (6 blocks: 2, 2, 1, 1), named
    by first and last block (`00-01`, a single one `04`). Fewer than four blocks make one band each.
    Groups without modules are left out.

    Returns:
        Positions in `modules`, by group name.
    """
    layers = sorted({spec.layer for spec in modules if spec.layer is not None})
    num_bands = min(_NUM_BANDS, len(layers))
    quotient, remainder = divmod(len(layers), num_bands) if num_bands else (0, 0)
    starts = [band * quotient + min(band, remainder) for band in range(num_bands + 1)]

    embedding = _positions(modules, part=Part.WORD_EMBEDDING)
    groups = {"all": tuple(index for index in range(len(modules)) if index not in embedding)}
    groups["WE"] = embedding
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
