"""Load a resolved model, and its adapter, as a sequence classifier or a causal language model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.sources.errors import SourceError, SourceErrorCode, SourceField
from workers.sources.heads import Head, Label, draw_head, inspect_head, match_labels
from workers.sources.libraries import (
    AUTO_MODELS,
    Task,
    build_skeleton,
    check_size,
    check_weights,
    quiet,
    refused,
)
from workers.sources.models import ResolvedModel
from workers.sources.placement import Placement, keep_differentiable
from workers.sources.tokenizers import has_chat_template, load_tokenizer
from workers.sources.weights import load_config, num_saved, saved_shapes

__all__ = [
    "Label",
    "LoadedModel",
    "has_chat_template",
    "is_on_paper",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "longest_input",
    "match_labels",
    "place_adapter",
]

_PROBE_TOKENS = 4
_CAUSAL_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on the CPU, in evaluation mode, with its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


def load_model(
    resolved: ResolvedModel,
    *,
    task: Task = "classification",
    labels: Sequence[Label] = (),
    new_head_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
) -> LoadedModel:
    """Load the model for a task.

    A classifier has one class per label, in that order. A causal language model has no labels; all
    its weights, the head among them, come from the checkpoint or are tied to others there.

    Args:
        resolved: what `resolve_model` answered, for the same task.
        task: what the model is for.
        labels: the label of each class; none for causal_lm.
        new_head_seed: draw a new classification head from this seed, for fine-tuning. Without it
            the head must be trained: in the model's weights, or in the adapter's. Causal language
            models keep theirs.
        dtype: of the weights.
        placement: where they go; None is the CPU.

    Raises:
        SourceError: the weights do not fit the config, there is no trained head, or a model for
            causal_lm sees later tokens.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(new_head_seed or 0)
        if task == "causal_lm":
            model = _load_causal(resolved, dtype=dtype, placement=placement)
        else:
            model = _load_classifier(
                resolved,
                labels=labels,
                dtype=dtype,
                is_new=new_head_seed is not None,
                placement=placement,
            )
    tokenizer = load_tokenizer(resolved)
    _check_vocabulary(model, tokenizer)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    if resolved.adapter_path is not None:
        model = _load_adapter(model, resolved=resolved)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer)


def load_skeleton(
    resolved: ResolvedModel,
    *,
    task: Task = "classification",
    labels: Sequence[Label] = (),
    pad_id: int | None = None,
) -> nn.Module:
    """Return the model, with its adapter, as `load_model` does but without memory for weights.

    Args:
        resolved: what `resolve_model` answered, for the same task.
        task: what the model is for.
        labels: the label of each class; none for causal_lm.
        pad_id: the token that batches are padded with.

    Raises:
        SourceError: the config or the adapter's is not valid.
    """
    config = load_config(resolved, task)
    if task == "classification":
        _set_labels(config, labels)
    for each in (config, config.get_text_config()):
        each.pad_token_id = pad_id
    with quiet():
        model = build_skeleton(config, task)
        if resolved.adapter_path is None:
            return model.eval()
        with refused("the adapter does not fit the model", "unsupported_adapter", "adapter"):
            adapter = PeftConfig.from_pretrained(str(resolved.adapter_path))
            adapted: nn.Module = get_peft_model(model, adapter, low_cpu_mem_usage=True)
        return adapted.eval()


def longest_input(resolved: ResolvedModel, *, task: Task = "classification") -> int | None:
    """Return how many tokens the model has positions for; None where it does not say.

    Raises:
        SourceError: the config is not valid.
    """
    config = load_config(resolved, task)
    configs = (config, config.get_text_config())
    limits = [getattr(of, "max_position_embeddings", None) for of in configs]
    # RoBERTa and its kin count positions from behind that of the padding
    limits += [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in _text_modules(build_skeleton(config, task), config)
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
    ]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def _text_modules(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:  # noqa: ANN401
    """Yield the modules with their names, without those of models for pictures and sounds."""
    text = type(config.get_text_config())
    others = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config.get_text_config()) is not text
    ]
    for name, module in model.named_modules():
        if not f"{name}.".startswith(tuple(others)):
            yield name, module


def _load_classifier(
    resolved: ResolvedModel,
    *,
    labels: Sequence[Label],
    dtype: torch.dtype,
    is_new: bool,
    placement: Placement | None,
) -> Any:  # noqa: ANN401 — transformers carries no types
    head = inspect_head(resolved)
    if not is_new and head.require_trained() != len(labels):
        raise _refusal(
            f"the model has {head.num_classes} classes, but {len(labels)} labels were given",
            "labels_mismatch",
            "model",
        )
    config = load_config(resolved, "classification")
    _set_labels(config, labels)
    model, report = _load_weights(
        resolved, config=config, task="classification", dtype=dtype, placement=placement
    )
    check_weights(report, may_miss=_replaced(head, report, is_new=is_new))
    if is_new:
        draw_head(model, names=head.names)
    return model


def _set_labels(config: Any, labels: Sequence[Label]) -> None:  # noqa: ANN401
    config.num_labels = len(labels)
    config.id2label = {i: str(label) for i, label in enumerate(labels)}
    config.label2id = {str(label): i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def _replaced(head: Head, report: dict[str, Any], *, is_new: bool) -> frozenset[str]:
    """Name the weights that come from elsewhere than the checkpoint."""
    if not is_new:
        return head.names if head.is_in_adapter else frozenset()
    # Encoders are often saved without the pooler that a new head goes with: it is drawn as well.
    return head.names | {name for name in report["missing_keys"] if ".pooler." in f".{name}"}


def _load_causal(
    resolved: ResolvedModel, *, dtype: torch.dtype, placement: Placement | None
) -> Any:  # noqa: ANN401
    config = load_config(resolved, "causal_lm")
    saved = saved_shapes(resolved, adapter=False)
    check_size(build_skeleton(config, "causal_lm"), num_saved=num_saved(saved))
    model, report = _load_weights(
        resolved, config=config, task="causal_lm", dtype=dtype, placement=placement
    )
    check_weights(report)
    _check_causal(model.eval())
    return model


def _load_weights(
    resolved: ResolvedModel,
    *,
    config: Any,  # noqa: ANN401
    task: Task,
    dtype: torch.dtype,
    placement: Placement | None,
) -> tuple[Any, dict[str, Any]]:
    with refused("the model's weights cannot be loaded", "unsupported_model", "model"):
        model, report = AUTO_MODELS[task].from_pretrained(
            resolved.path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(placement.options() if placement is not None else {}),
        )
    keep_differentiable(model)
    return model, report


def _check_causal(model: Any) -> None:  # noqa: ANN401
    """Refuse a model that sees the tokens it is to predict, as BERT with an LM head does."""
    logits: list[Tensor] = []
    with refused("the model does not run", "unsupported_model", "model"), torch.no_grad():
        vocabulary = model.get_input_embeddings().num_embeddings
        ids_BS = torch.arange(2 * _PROBE_TOKENS).view(2, _PROBE_TOKENS) % vocabulary
        ids_BS[:, 0] = 0
        for ids_S in ids_BS:
            inputs = {"input_ids": ids_S[None], "attention_mask": torch.ones_like(ids_S)[None]}
            logits.append(model(**inputs, use_cache=False).logits[0, 0].float())
    spread = float(logits[0].abs().max().clamp(min=1e-6))
    # NaN weights are not the matter of this check
    if float((logits[0] - logits[1]).abs().max()) > _CAUSAL_TOLERANCE * spread:
        raise _refusal(
            f"this {model.config.model_type} model sees the tokens that follow, so it is no causal "
            "language model; set is_decoder in its config.json if it was trained as one",
            "unsupported_model",
            "model",
        )


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: ANN401
    """Refuse a padding token that was added to the tokenizer and never to the model."""
    with refused("the model has no word embedding", "unsupported_model", "model"):
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and tokenizer.pad_token_id >= known:
        raise _refusal(
            f"the tokenizer's padding token {tokenizer.pad_token!r} has id "
            f"{tokenizer.pad_token_id}, but the model embeds {known} tokens; set pad_token to one "
            "of these",
            "unsupported_model",
            "model",
        )


def _load_adapter(model: Any, *, resolved: ResolvedModel) -> PeftModel:  # noqa: ANN401
    with refused("the adapter does not fit the model", "unsupported_adapter", "adapter"):
        config = PeftConfig.from_pretrained(str(resolved.adapter_path))
        config.inference_mode = True
        adapted: Any = get_peft_model(model, config)
        place_adapter(adapted)
        # from_pretrained would spread a model anew whose weights lie on several devices
        weights = load_peft_weights(str(resolved.adapter_path), device="cpu")
        set_peft_model_state_dict(adapted, weights)
    # What the file lacks would stay at its random start, and what it has too much be dropped.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    differing = sorted(expected ^ saved_shapes(resolved, adapter=True).keys())
    if differing:
        raise _refusal(
            "the adapter's weights do not match its config and the model: "
            f"{', '.join(differing[:5])}",
            "unsupported_adapter",
            "adapter",
        )
    return adapted


def is_on_paper(model: nn.Module) -> bool:
    """Whether a model has no memory for any of its weights."""
    return all(weight.is_meta for weight in model.parameters())


def place_adapter(model: nn.Module) -> None:
    """Begin the adapter of layers whose weights are brought to them where these layers run.

    PEFT begins it where the weights are: nowhere.
    """
    for module in model.modules():
        hook: Any = getattr(getattr(module, "base_layer", None), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None or not hasattr(module, "lora_A"):
            continue
        layer: Any = module
        for name, factor in layer.lora_A.items():
            if factor.weight.is_meta:
                factor.to_empty(device=device)
                layer.lora_B[name].to_empty(device=device)
                layer.reset_lora_parameters(name, init_lora_weights=True)


def _refusal(message: str, code: SourceErrorCode, field: SourceField) -> SourceError:
    return SourceError(message, code=code, field=field)
