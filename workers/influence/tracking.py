"""Choose the modules of a model that gradients are taken of."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from workers.influence.errors import UnsupportedModule
from workers.influence.layers import (
    BlockStack,
    Part,
    find_head,
    find_targets,
    find_word_embedding,
)
from workers.influence.lora import MergedAdapter, is_adapted, merge_adapter
from workers.influence.module_kinds import Embedding, Kind, Lora
from workers.influence.verification import supported_kind


@dataclass(frozen=True, slots=True)
class Site:
    """A module to track, and where it stands."""

    name: str
    module: nn.Module
    kind: Kind
    layer: int | None
    part: Part


def merge(model: nn.Module, target_modules: Sequence[str] | None) -> MergedAdapter:
    """Merge a PEFT model's adapter; a plain model is handed on as it is.

    Raises:
        ValueError: `target_modules` given for a PEFT model, or missing for a plain one.
    """
    if is_adapted(model):
        if target_modules is not None:
            raise ValueError("target_modules must be None: the adapter names its own modules.")
        return merge_adapter(model)
    if not target_modules:
        raise ValueError("target_modules must name layers of a model without an adapter.")
    return MergedAdapter(model=model, factors={}, saved_names=())


def find_sites(
    merged: MergedAdapter,
    stack: BlockStack,
    target_modules: Sequence[str],
    *,
    with_head: bool,
    with_word_embedding: bool,
) -> list[Site]:
    """Name everything that is tracked: adapted or targeted modules, the head, the word embedding.

    Args:
        merged: the model, its factors and the modules saved beside them.
        stack: its blocks.
        target_modules: what to track of a model without factors.
        with_head: whether the classification head of a model without factors is tracked.
        with_word_embedding: whether the word embedding is tracked.

    Raises:
        UnsupportedModule: a module whose gradients would not be exact.
        NoTrackedModules: a target names nothing.
    """
    model, factors = merged.model, merged.factors
    names = list(merged.saved_names)
    if not factors:
        head = find_head(model, stack) if with_head else []
        targets = find_targets(model, stack, target_modules)
        names = [name for name in targets if name not in head] + head
    sites = [_lora_site(name, merged, stack) for name in factors]
    owners = _owners(model)
    for name in names:
        if _is_word_embedding(name, model):
            # one that was trained beside an adapter is left out unless it is asked for
            with_word_embedding |= not factors
        else:
            sites.append(_whole_site(name, model, stack, owners, is_saved=bool(factors)))
    if with_word_embedding:
        name, module = find_word_embedding(model)
        kind = supported_kind(name, module, with_bias=True)
        sites.append(Site(name, module, kind, None, Part.WORD_EMBEDDING))
    return sites


def _is_word_embedding(name: str, model: nn.Module) -> bool:
    module = model.get_submodule(name)
    return isinstance(module, nn.Embedding) and module is find_word_embedding(model)[1]


def _lora_site(name: str, merged: MergedAdapter, stack: BlockStack) -> Site:
    module = merged.model.get_submodule(name)
    if merged.is_merged:
        supported_kind(name, module, with_bias=False)
    return Site(name, module, Lora(module, merged.factors[name]), *stack.locate(name))


def _whole_site(
    name: str,
    model: nn.Module,
    stack: BlockStack,
    owners: dict[int, list[nn.Module]],
    *,
    is_saved: bool,
) -> Site:
    module = model.get_submodule(name)
    layer, part = stack.locate(name)
    kind = supported_kind(name, module, with_bias=is_saved or part is not Part.ATTENTION)
    if isinstance(kind, Embedding):
        raise UnsupportedModule(
            f"module '{name}' is an embedding other than that of the words; "
            "leave it out of the target modules."
        )
    for suffix in kind.shapes():
        sharing = owners[id(module.get_parameter(suffix))]
        if len(sharing) > 1 and not any(isinstance(each, nn.Embedding) for each in sharing):
            raise UnsupportedModule(
                f"module '{name}' shares its {suffix} with another module; "
                "only modules with parameters of their own are audited."
            )
    return Site(name, module, kind, layer, part)


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that hold each parameter, by the parameter's identity."""
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(module)
    return owners
