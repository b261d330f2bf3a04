"""Read the LoRA factors out of a PEFT model and merge them into its weights.

PEFT's layers are recognised by their attributes, so that the engine needs torch alone.

Shapes: R rank, I input features, O output features.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from workers.influence.errors import NoTrackedModules, UnsupportedModule

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One LoRA adapter of one linear layer: output += scaling · x Aᵀ Bᵀ."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """A model with its adapter merged, and what is needed for the adapter's gradients.

    Attributes:
        model: the base model; its weights hold the adapter.
        factors: the factors (float32) by the name of the linear layer.
        saved_names: linear layers that were trained whole beside the adapter (the head).
    """

    model: nn.Module
    factors: dict[str, LoraFactors]
    saved_names: tuple[str, ...]


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def merge_adapter(model: nn.Module) -> MergedAdapter:
    """Keep the factors of the active LoRA adapter and merge it into the base weights.

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
            saved_names += _saved_linears(name, module, adapter)
        elif hasattr(module, "original_module"):
            raise UnsupportedModule(
                f"module '{name}' is trained as a {type(module).__name__}; only LoRA on linear "
                "layers and whole linear layers (modules_to_save) are audited."
            )
    if not factors:
        raise NoTrackedModules(f"adapter '{adapter}' has no LoRA layer; check its target modules.")
    _refuse_shared_weights(model)
    merged = cast("Any", model).merge_and_unload()
    return MergedAdapter(model=merged, factors=factors, saved_names=tuple(saved_names))


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
    if config.fan_in_fan_out:
        raise UnsupportedModule(
            f"adapter '{adapter}' has fan_in_fan_out set (Conv1D layers, as in GPT-2); "
            "only linear layers are audited."
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
    if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
        raise UnsupportedModule(
            f"module '{name}' has LoRA on a {type(base).__name__} "
            f"of {getattr(getattr(base, 'weight', None), 'dtype', 'unknown type')}; "
            "only linear layers with unquantised weights are audited."
        )
    variant = layer.lora_variant.get(adapter)
    if variant is not None or layer.use_dora.get(adapter, False):
        kind = type(variant).__name__ if variant is not None else "DoRA"
        raise UnsupportedModule(
            f"module '{name}' uses the LoRA variant {kind}; only plain LoRA is audited."
        )
    if layer.lora_bias.get(adapter, False):
        raise UnsupportedModule(
            f"module '{name}' has a bias in its LoRA factors; train it with lora_bias=False."
        )
    return LoraFactors(
        a_RI=layer.lora_A[adapter].weight.detach().float().clone(),
        b_OR=layer.lora_B[adapter].weight.detach().float().clone(),
        scaling=float(layer.scaling[adapter]),
    )


def _saved_linears(name: str, wrapper: nn.Module, adapter: str) -> list[str]:
    copies: Any = wrapper.modules_to_save
    if adapter not in copies:
        return []
    names = []
    for path, module in copies[adapter].named_modules():
        full_name = f"{name}.{path}" if path else name
        if isinstance(module, nn.Linear):
            names.append(full_name)
        elif next(module.parameters(recurse=False), None) is not None:
            raise UnsupportedModule(
                f"module '{full_name}' ({type(module).__name__}) is trained beside the adapter; "
                "only linear layers may stand in modules_to_save."
            )
    return names


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
