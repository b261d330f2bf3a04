"""Configuration files of other people's models: read, checked, and cleaned of what could run code.

The libraries that read these files act on some keys: they import modules, download kernels, open
other files. What stays here is data; the libraries only ever see the cleaned copies.
"""

import json
import re
from pathlib import Path
from typing import Any

from workers.sources.errors import SourceError, SourceErrorCode, SourceField

MAX_CONFIG_BYTES = 8 * 1024**2
_MAX_LAYERS = 1_000
_MAX_EXPERTS = 4_096
_MAX_CLASSES = 10_000  # the library names each
_MAX_DIMENSION = 2**31 - 1
# Keys at which a library imports code, fetches kernels or opens a file of the config's choice, and
# those that change what a forward pass returns.
_CODE_KEY = re.compile(
    r"auto_map|custom_pipelines|trust_remote_code|code_revision|.*_implementation.*|.*kernel_config.*"
    r"|use_kernels|transformers_weights|_?name_or_path|gguf_file|gradient_checkpointing"
    r"|output_attentions|output_hidden_states|use_return_dict|return_dict|torchscript"
)
_FILE_KEY = re.compile(r".*_files?|.*_path")
# A name or a number pattern of modules; a regular expression of a stranger's could run for ever.
_MODULE_NAME = re.compile(r"[\w.]{1,200}", re.ASCII)

_ADAPTER_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
}
# What says nothing about the adapted model at inference, or is only a record of its training.
_ADAPTER_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}


def read_json(path: Path, *, field: SourceField) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        SourceError: unreadable_file.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise _refusal(
            f"{path.name} has more than {MAX_CONFIG_BYTES:,} bytes", "unreadable_file", field
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refusal(
            f"{path.name} is not valid JSON: {error}", "unreadable_file", field
        ) from error
    if not isinstance(content, dict):
        raise _refusal(f"{path.name} does not hold a JSON object", "unreadable_file", field)
    return content


def clean_model_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's config.json without the keys that a library would act on.

    Raises:
        SourceError: unsupported_model, for quantized weights and absurd sizes.
    """
    if config.get("quantization_config"):
        raise _refusal(
            "config.json has a quantization_config; influence needs plain weights: save the model "
            "dequantized",
            "unsupported_model",
            "model",
        )
    cleaned = _without(config, _CODE_KEY)
    _check_sizes(cleaned)
    return cleaned


def clean_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json without code and without paths to other files.

    The chat template stays: Transformers renders it in Jinja's ImmutableSandboxedEnvironment
    (utils/chat_template_utils.py), where a template reaches neither Python's internals nor files
    nor the network, and cannot change what it is given.
    """
    return _without(_without(config, _CODE_KEY), _FILE_KEY)


def clean_adapter_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter_config.json that holds what plain LoRA needs and nothing else.

    Raises:
        SourceError: unsupported_adapter, naming the option that cannot be audited.
    """
    if config.get("peft_type") != "LORA":
        raise _refusal(
            f"the adapter's peft_type is {config.get('peft_type')!r}; only LORA can be audited",
            "unsupported_adapter",
            "adapter",
        )
    if config.get("task_type") not in ("SEQ_CLS", "CAUSAL_LM"):
        raise _refusal(
            f"the adapter's task_type is {config.get('task_type')!r}; only adapters of sequence "
            "classification (SEQ_CLS) and of causal language models (CAUSAL_LM) can be audited",
            "unsupported_adapter",
            "adapter",
        )
    for key, value in config.items():
        if key not in _ADAPTER_DEFAULTS and key not in _ADAPTER_IGNORED and value:
            raise _refusal(
                f"the adapter uses {key}={value!r}, which is not plain LoRA and cannot be audited",
                "unsupported_adapter",
                "adapter",
            )
    cleaned = {key: config.get(key, default) for key, default in _ADAPTER_DEFAULTS.items()}
    _check_adapter_values(cleaned)
    return cleaned | {
        "peft_type": "LORA",
        "task_type": config["task_type"],
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def _check_adapter_values(config: dict[str, Any]) -> None:
    ranks = [config["r"], *_values(config["rank_pattern"])]
    if not all(type(rank) is int and 0 < rank <= 2**16 for rank in ranks):
        raise _refusal(
            "the adapter's rank r must be a positive integer", "unsupported_adapter", "adapter"
        )
    names: list[object] = []
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config[key]
        if isinstance(value, str) and key == "target_modules" and value != "all-linear":
            raise _refusal(
                "the adapter's target_modules is a pattern; write the names as a list",
                "unsupported_adapter",
                "adapter",
            )
        names += value if isinstance(value, list) else [value]
    for key in ("rank_pattern", "alpha_pattern"):
        names += list(config[key] or {}) if isinstance(config[key], dict | None) else [config[key]]
    for name in names:
        if name not in (None, "all-linear") and not (
            isinstance(name, str) and _MODULE_NAME.fullmatch(name)
        ):
            raise _refusal(
                f"the adapter names the module {name!r}; only plain module names are taken",
                "unsupported_adapter",
                "adapter",
            )


def _values(mapping: object) -> list[object]:
    return list(mapping.values()) if isinstance(mapping, dict) else []


def _without(mapping: dict[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    """Return a JSON object without the keys that match, at every depth."""

    def clean(value: Any) -> Any:  # noqa: ANN401 — any JSON
        if isinstance(value, dict):
            return _without(value, pattern)
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(item) for key, item in mapping.items() if not pattern.fullmatch(key)}


def _check_sizes(value: Any, *, key: str = "") -> None:  # noqa: ANN401 — any JSON
    """Refuse sizes that no model has, before something is allocated or counted up to them."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_sizes(item, key=str(name))
    elif isinstance(value, list):
        for item in value:
            _check_sizes(item, key=key)
    elif isinstance(value, int):
        least, most = _bounds(key)
        if value > most:
            raise _refusal(
                f"config.json has {key}={value}; at most {most:,} is taken",
                "unsupported_model",
                "model",
            )
        if value < least:
            raise _refusal(f"config.json has {key}={value}", "unsupported_model", "model")


def _bounds(key: str) -> tuple[int, int]:
    """Return the least and the most that a number may be; many have -1 for nothing."""
    if key.endswith(("layers", "n_layer")):
        return 0, _MAX_LAYERS
    if key.endswith("experts"):
        return -1, _MAX_EXPERTS
    return -_MAX_DIMENSION, _MAX_CLASSES if key == "num_labels" else _MAX_DIMENSION


def _refusal(message: str, code: SourceErrorCode, field: SourceField) -> SourceError:
    return SourceError(message, code=code, field=field)
