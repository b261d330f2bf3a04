"""Read the LoRA and DoRA factors out of a PEFT model and merge them into its weights.

PEFT's layers are recognised by their attributes, so that the engine needs torch alone.

Shapes: R rank, I input features, O output features.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.influence.errors import NoTrackedModules, UnsupportedModule
from workers.influence.layers import is_elsewhere, is_linear_like

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One adapter of one linear layer.

    LoRA: output += scaling · x Aᵀ Bᵀ. DoRA ("weight-decomposed" LoRA, Liu et al. 2024) also
    rescales every output feature: y = (m / n) ⊙ (x W₀ᵀ + scaling · x Aᵀ Bᵀ) + b, with n the length
    of the rows of W₀ + scaling · B A, a constant for the gradients (section 4.3 there).

    Attributes:
        magnitude_O: DoRA's m; None for LoRA.
        gain_O: DoRA's m / n; None for LoRA.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    magnitude_O: Tensor | None = None
    gain_O: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A model with its adapter merged, and what is needed for the adapter's gradients.

    Weights in fewer bits would lose a merged adapter in their rounding, and weights that lie on
    disk cannot be written to: on these the adapter stays beside its layers, which give the same
    outputs and gradients.

    Attributes:
        model: the base model; its weights hold the adapter, or its layers run it beside them.
        factors: the factors (float32) by the name of the linear layer.
        saved_names: modules that were trained whole beside the adapter (the head).
        is_merged: whether the weights hold the adapter, and may be cast.
    """

    model: nn.Module
    factors: dict[str, LoraFactors]
    saved_names: tuple[str, ...]
    is_merged: bool = True


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def merge_adapter(model: nn.Module) -> MergedAdapter:
    """Keep the factors of the active LoRA adapter and merge it where the base weights allow it.

    Raises:
        UnsupportedModule: the adapter has something that the gradients of the factors would miss.
        NoTrackedModules: the adapter has no layer at all.
    """
    adapter = _active_adapter(model)
    factors: dict[str, LoraFactors] = {}
    saved_names: list[str] = []
    for path, module in model.named_modules():
        name = path.removeprefix(_PREFIX)
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            factor = _read_factors(name, module, adapter)
            if factor is not None:
                factors[name] = factor
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            saved_names += _saved_modules(name, module, adapter)
        elif hasattr(module, "original_module"):
            raise UnsupportedModule(
                f"module '{name}' is trained as a {type(module).__name__}; only LoRA on linear "
                "layers and whole modules (modules_to_save) are audited."
            )
    if not factors:
        raise NoTrackedModules(f"adapter '{adapter}' has no LoRA layer; check its target modules.")
    _refuse_shared_weights(model)
    if all(_can_be_written(module) for module in model.modules()):
        merged = cast("Any", model).merge_and_unload()
        return MergedAdapter(model=merged, factors=factors, saved_names=tuple(saved_names))
    return MergedAdapter(
        model=_unwrapped(model, adapter),
        factors=factors,
        saved_names=tuple(saved_names),
        is_merged=False,
    )


def _can_be_written(module: nn.Module) -> bool:
    weights = module.parameters(recurse=False)
    return all(each.is_floating_point() for each in weights) and not is_elsewhere(module)


def _unwrapped(model: nn.Module, adapter: str) -> nn.Module:
    """Return the base model with the adapter's own layers, and its saved modules in their place."""
    base: nn.Module = cast("Any", model).get_base_model()
    for name, module in list(base.named_modules()):
        if hasattr(module, "modules_to_save") and adapter in cast("Any", module).modules_to_save:
            parent, _, own_name = name.rpartition(".")
            setattr(
                base.get_submodule(parent), own_name, cast("Any", module).modules_to_save[adapter]
            )
    return base


def _active_adapter(model: nn.Module) -> str:
    peft: Any = model
    active = list(peft.active_adapters)
    if len(active) != 1:
        raise UnsupportedModule(
            f"{len(active)} adapters are active ({', '.join(active)}); activate exactly one."
        )
    adapter = str(active[0])
    config: Any = peft.peft_config[adapter]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UnsupportedModule(
            f"adapter '{adapter}' is of type {config.peft_type}; only LoRA is audited."
        )
    if config.bias != "none":
        raise UnsupportedModule(
            f"adapter '{adapter}' trains biases (bias='{config.bias}'); train it with bias='none'."
        )
    return adapter


def _read_factors(name: str, module: nn.Module, adapter: str) -> LoraFactors | None:
    layer: Any = module
    if adapter in layer.lora_embedding_A:
        raise UnsupportedModule(
            f"module '{name}' has LoRA on an embedding; only LoRA on linear layers is audited."
        )
    if adapter not in layer.lora_A:
        return None
    base = layer.get_base_layer()
    if not is_linear_like(base):
        raise UnsupportedModule(
            f"module '{name}' has LoRA on a {type(base).__name__}; only linear layers are audited."
        )
    is_transposed = not isinstance(base, nn.Linear)
    if bool(layer.fan_in_fan_out) != is_transposed:
        raise UnsupportedModule(
            f"module '{name}' is a {type(base).__name__}, but its adapter has "
            f"fan_in_fan_out={layer.fan_in_fan_out}; train it with fan_in_fan_out={is_transposed}."
        )
    variant = layer.lora_variant.get(adapter)
    uses_dora = layer.use_dora.get(adapter, False)
    if variant is not None and not uses_dora:
        raise UnsupportedModule(
            f"module '{name}' uses the LoRA variant {type(variant).__name__}; "
            "only plain LoRA and DoRA are audited."
        )
    if layer.lora_bias.get(adapter, False):
        raise UnsupportedModule(
            f"module '{name}' has a bias in its LoRA factors; train it with lora_bias=False."
        )
    factors = LoraFactors(
        a_RI=layer.lora_A[adapter].weight.detach().float().clone(),
        b_OR=layer.lora_B[adapter].weight.detach().float().clone(),
        scaling=float(layer.scaling[adapter]),
    )
    if not uses_dora:
        return factors
    if not _can_be_written(base):
        raise UnsupportedModule(
            f"module '{name}' has DoRA on a weight of {base.weight.dtype}, which is quantised or "
            "lies elsewhere; only plain LoRA is audited there."
        )
    weight_OI = base.weight.detach().T if is_transposed else base.weight.detach()
    magnitude_O = layer.lora_magnitude_vector[adapter].weight.detach().float().clone()
    if bool((magnitude_O == 0).any()):
        raise UnsupportedModule(
            f"module '{name}' has a zero in DoRA's magnitude vector; only nonzero ones are audited."
        )
    length_O = torch.linalg.vector_norm(
        weight_OI.float() + factors.scaling * factors.b_OR @ factors.a_RI, dim=1
    )
    return replace(factors, magnitude_O=magnitude_O, gain_O=magnitude_O / length_O)


def _saved_modules(name: str, wrapper: nn.Module, adapter: str) -> list[str]:
    copies: Any = wrapper.modules_to_save
    if adapter not in copies:
        return []
    return [
        f"{name}.{path}" if path else name
        for path, module in copies[adapter].named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


def _refuse_shared_weights(model: nn.Module) -> None:
    # merging into a weight that two layers share would add both adapters to both layers
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for name, parameter in module.named_parameters():
            if uses[id(parameter)] > 1:
                raise UnsupportedModule(
                    f"module '{path.removeprefix(_PREFIX)}' shares its {name} with another module; "
                    "only layers with weights of their own are audited."
                )
