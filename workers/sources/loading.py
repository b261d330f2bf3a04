"""Load a resolved model, and its adapter, as a sequence classifier."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.models import ResolvedModel, weight_files
from workers.sources.staging import check_unchanged

Label = int | str

# What the libraries raise over files that they cannot make sense of.
_LOADING_ERRORS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_ADAPTER_PREFIX = "base_model.model."
# A base checkpoint lacks its head, and often ties or drops a few tensors; far more means that the
# config describes another model, and missing weights would be made up.
_MAX_PARAMETERS_PER_SAVED = 2
_FREE_PARAMETERS = 50_000_000


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A sequence classifier on the CPU, in evaluation mode, with its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Head:
    """The parameters after the encoder, by name, and the number of classes the weights have."""

    names: frozenset[str]
    num_classes: int | None
    is_in_adapter: bool


def match_labels(resolved: ResolvedModel, labels: Sequence[Label]) -> tuple[Label, ...]:
    """Return the label of each class of a trained model, in the order of its classes.

    Names in the model's config are matched as text. Without names the labels must be the integers
    from 0 to the number of classes less one: the order of text labels would be a guess.

    Args:
        resolved: a model whose head is trained.
        labels: the labels of the dataset; the model may know more.

    Raises:
        SourceError: untrained_head, or labels_mismatch.
    """
    head = _inspect_head(resolved)
    num_classes = _require_trained(head)
    names = resolved.class_names
    if names is not None and len(names) == num_classes:
        label_of_name = {str(label): label for label in labels}
        unknown = sorted(label_of_name.keys() - set(names))
        if not unknown:
            return tuple(label_of_name.get(name, name) for name in names)
    else:
        unknown = [str(label) for label in labels]
    if all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        return tuple(range(num_classes))
    known = f"the model's classes are {', '.join(names)}" if names else "the model names no classes"
    raise _refusal(
        f"the dataset has the labels {', '.join(unknown[:10])}, but {known}; use these names, or "
        f"the integers 0 to {num_classes - 1}, or set id2label in the model's config.json",
        "labels_mismatch",
        "dataset",
    )


def load_model(
    resolved: ResolvedModel,
    *,
    labels: Sequence[Label],
    new_head_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load the model with one class per label, in that order.

    Args:
        resolved: what `resolve_model` answered.
        labels: the label of each class.
        new_head_seed: draw a new head from this seed, for fine-tuning. Without it the head must be
            trained: in the model's weights, or in the adapter's.
        dtype: of the weights.

    Raises:
        SourceError: the weights do not fit the config, or there is no trained head.
    """
    head = _inspect_head(resolved)
    if new_head_seed is None and _require_trained(head) != len(labels):
        raise _refusal(
            f"the model has {head.num_classes} classes, but {len(labels)} labels were given",
            "labels_mismatch",
            "model",
        )
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(new_head_seed or 0)
        model = _load_base(
            resolved, labels=labels, head=head, dtype=dtype, is_new=new_head_seed is not None
        )
        if new_head_seed is not None:
            _draw_head(model, names=head.names)
    tokenizer = load_tokenizer(resolved)
    model.config.pad_token_id = tokenizer.pad_token_id
    if resolved.adapter_path is not None:
        model = _load_adapter(model, resolved=resolved)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer)


def longest_input(resolved: ResolvedModel) -> int | None:
    """Return how many tokens the model has positions for; None where it does not say.

    Raises:
        SourceError: the config is not valid.
    """
    limits = [getattr(_load_config(resolved), "max_position_embeddings", None)]
    # RoBERTa and its kin count positions from behind that of the padding
    limits += [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in _skeleton(resolved).named_modules()
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
    ]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def _skeleton(resolved: ResolvedModel) -> nn.Module:
    """Build the architecture without memory."""
    config = _load_config(resolved)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=False
            )
    except _LOADING_ERRORS as error:
        raise _refusal(
            f"no {resolved.model_type} model can be built from config.json: {error}",
            "unsupported_model",
            "model",
        ) from error
    return model


def _inspect_head(resolved: ResolvedModel) -> _Head:
    """Look at the architecture, and see which of its head's weights were saved."""
    skeleton: Any = _skeleton(resolved)
    saved = _saved_shapes(resolved, adapter=False)
    num_saved = sum(torch.Size(shape).numel() for shape in saved.values())
    num_described = sum(parameter.numel() for parameter in skeleton.parameters())
    if num_described > _MAX_PARAMETERS_PER_SAVED * num_saved + _FREE_PARAMETERS:
        raise _refusal(
            f"config.json describes {num_described:,} parameters, the weights hold {num_saved:,}",
            "unsupported_model",
            "model",
        )
    prefix = f"{skeleton.base_model_prefix}."
    names = [name for name, _ in skeleton.named_parameters() if not name.startswith(prefix)]
    last = [name for name in names if name.endswith("weight")][-1]
    in_adapter = _saved_shapes(resolved, adapter=True)
    if _ADAPTER_PREFIX + last in in_adapter:
        num_classes = in_adapter[_ADAPTER_PREFIX + last][0]
        return _Head(frozenset(names), num_classes, is_in_adapter=True)
    is_saved = all(name in saved for name in names)
    return _Head(frozenset(names), saved[last][0] if is_saved else None, is_in_adapter=False)


def _require_trained(head: _Head) -> int:
    if head.num_classes is None:
        raise _refusal(
            f"the model has no trained classification head ({', '.join(sorted(head.names))} are "
            "missing); ask for fine-tuning, or give an adapter that holds the head",
            "untrained_head",
            "model",
        )
    return head.num_classes


def _saved_shapes(resolved: ResolvedModel, *, adapter: bool) -> dict[str, tuple[int, ...]]:
    folder = resolved.adapter_path if adapter else resolved.path
    if folder is None:
        return {}
    check_unchanged(folder, field="adapter" if adapter else "model")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def _load_config(resolved: ResolvedModel) -> Any:  # noqa: ANN401 — transformers carries no types
    try:
        return AutoConfig.from_pretrained(
            resolved.path, trust_remote_code=False, local_files_only=True
        )
    except _LOADING_ERRORS as error:
        raise _refusal(
            f"config.json is not valid: {error}", "unsupported_model", "model"
        ) from error


def _load_base(
    resolved: ResolvedModel,
    *,
    labels: Sequence[Label],
    head: _Head,
    dtype: torch.dtype,
    is_new: bool,
) -> Any:  # noqa: ANN401 — transformers carries no types
    config = _load_config(resolved)
    config.num_labels = len(labels)
    config.id2label = {i: str(label) for i, label in enumerate(labels)}
    config.label2id = {str(label): i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            resolved.path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except _LOADING_ERRORS as error:
        raise _refusal(
            f"the model's weights cannot be loaded: {error}", "unsupported_model", "model"
        ) from error
    replaced = head.names if is_new or head.is_in_adapter else frozenset()
    mismatched = {name for name, *_ in report["mismatched_keys"]} - replaced
    if mismatched:
        raise _refusal(
            f"weights have other shapes than config.json says: {', '.join(sorted(mismatched)[:5])}",
            "unsupported_model",
            "model",
        )
    # Encoders are often saved without the pooler that a new head goes with: it is drawn as well.
    missing = {
        name for name in report["missing_keys"] if not (is_new and ".pooler." in f".{name}")
    } - replaced
    if missing:
        raise _refusal(
            f"weights are missing: {', '.join(sorted(missing)[:5])}", "missing_file", "model"
        )
    return model


def _draw_head(model: Any, *, names: frozenset[str]) -> None:  # noqa: ANN401
    """Draw the head anew from the global generator, whatever the checkpoint had in its place."""
    spread = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
            if not own or not own <= names:
                continue
            if isinstance(module, nn.Linear):
                module.weight.normal_(mean=0.0, std=spread)
                if module.bias is not None:
                    module.bias.zero_()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()


@contextmanager
def _quiet() -> Iterator[None]:
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


def _load_adapter(model: Any, *, resolved: ResolvedModel) -> PeftModel:  # noqa: ANN401
    try:
        adapted = PeftModel.from_pretrained(
            model,
            str(resolved.adapter_path),
            is_trainable=False,
            torch_device="cpu",
            use_safetensors=True,
        )
    except _LOADING_ERRORS as error:
        raise _refusal(
            f"the adapter does not fit the model: {error}", "unsupported_adapter", "adapter"
        ) from error
    # What the file lacks would stay at its random start, and what it has too much be dropped.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    differing = sorted(expected ^ _saved_shapes(resolved, adapter=True).keys())
    if differing:
        raise _refusal(
            "the adapter's weights do not match its config and the model: "
            f"{', '.join(differing[:5])}",
            "unsupported_adapter",
            "adapter",
        )
    return adapted


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a padding token pads with its end token.

    Raises:
        SourceError: it cannot be loaded, or has neither token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # The tokenizers' Rust part raises plain Exception; signals and the like pass through.
        if type(error) is not Exception and not isinstance(error, _LOADING_ERRORS):
            raise
        raise _refusal(
            f"the tokenizer cannot be loaded: {error}", "unreadable_file", "model"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise _refusal(
                "the tokenizer has neither a padding nor an end token; set pad_token",
                "unsupported_model",
                "model",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _refusal(message: str, code: SourceErrorCode, field: SourceField) -> SourceError:
    return SourceError(message, code=code, field=field)
