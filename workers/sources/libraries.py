"""How the model libraries are called here: without code of others, without noise, errors named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging

from workers.sources.errors import SourceError, SourceErrorCode, SourceField

Task = Literal["classification", "causal_lm"]

AUTO_MODELS: dict[Task, Any] = {
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
}
# The architectures that a config.json may name.
ARCHITECTURES: dict[Task, frozenset[str]] = {
    "classification": frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "causal_lm": frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
_HEADS: dict[Task, str] = {
    "classification": "a sequence classification head",
    "causal_lm": "a causal language model head",
}
# A base checkpoint lacks its head, and often ties or drops a few tensors; far more means that the
# config describes another model, and missing weights would be made up.
_MAX_PARAMETERS_PER_SAVED = 2
_FREE_PARAMETERS = 50_000_000

# What the libraries raise over files that they cannot make sense of.
_LOADING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextmanager
def refused(message: str, code: SourceErrorCode, field: SourceField) -> Iterator[None]:
    """Turn what a library raises over a file into a `SourceError`: the message and the cause."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        # The tokenizers' Rust part raises plain Exception; signals and the like pass through.
        if type(error) is not Exception and not isinstance(error, _LOADING_ERRORS):
            raise
        cause = str(error) or type(error).__name__
        raise SourceError(f"{message}: {cause}", code=code, field=field) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's progress bars and its table of missing weights: we check them here."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def check_architecture(model_type: object, task: Task) -> str:
    """Return the model_type of a config if the libraries have that architecture for the task.

    Raises:
        SourceError: unsupported_model.
    """
    if str(model_type) not in ARCHITECTURES[task]:
        raise SourceError(
            f"model_type {model_type!r} is not an architecture with {_HEADS[task]} that this "
            "server knows",
            code="unsupported_model",
            field="model",
        )
    return str(model_type)


def check_text_config(config: Any, task: Task) -> None:  # noqa: ANN401 — transformers carries no types
    """Refuse an architecture whose config does not say how large its text model is.

    Models of several kinds of input nest the config of their text model; what an audit plans its
    batches by must stand there.

    Raises:
        SourceError: unsupported_model, naming what is missing.
    """
    needed = ["hidden_size", "num_hidden_layers"]
    if task == "causal_lm":
        needed.append("vocab_size")
    with refused("config.json has no single text model", "unsupported_model", "model"):
        text = config.get_text_config()
    missing = [name for name in needed if not isinstance(getattr(text, name, None), int)]
    if missing:
        raise SourceError(
            f"{config.model_type} models cannot be audited: the config of their text model does "
            f"not say {', '.join(missing)}; use a model of another architecture",
            code="unsupported_model",
            field="model",
        )


def build_skeleton(config: Any, task: Task) -> nn.Module:  # noqa: ANN401 — transformers carries no types
    """Build the architecture without memory for its weights.

    Raises:
        SourceError: unsupported_model.
    """
    message = f"no {config.model_type} model can be built from config.json"
    with refused(message, "unsupported_model", "model"), torch.device("meta"):
        model: nn.Module = AUTO_MODELS[task].from_config(config, trust_remote_code=False)
    return model


def check_size(skeleton: nn.Module, *, num_saved: int) -> None:
    """Refuse a config that describes a far larger model than the weights are of.

    Raises:
        SourceError: unsupported_model.
    """
    num_described = sum(parameter.numel() for parameter in skeleton.parameters())
    if num_described > _MAX_PARAMETERS_PER_SAVED * num_saved + _FREE_PARAMETERS:
        raise SourceError(
            f"config.json describes {num_described:,} parameters, the weights hold {num_saved:,}",
            code="unsupported_model",
            field="model",
        )


def check_weights(report: dict[str, Any], *, may_miss: frozenset[str] = frozenset()) -> None:
    """Raise if weights are missing or have other shapes than the config says.

    Args:
        report: what `from_pretrained` says of the loading.
        may_miss: names of weights that come from elsewhere.

    Raises:
        SourceError: unsupported_model or missing_file.
    """
    mismatched = {name for name, *_ in report["mismatched_keys"]} - may_miss
    if mismatched:
        raise SourceError(
            f"weights have other shapes than config.json says: {', '.join(sorted(mismatched)[:5])}",
            code="unsupported_model",
            field="model",
        )
    missing = set(report["missing_keys"]) - may_miss
    if missing:
        raise SourceError(
            f"weights are missing: {', '.join(sorted(missing)[:5])}",
            code="missing_file",
            field="model",
        )
