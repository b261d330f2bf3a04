"""Tiny models, their samples, and losses written without the engine.

Shapes: N samples, B batch, S sequence, C classes, V vocabulary, H width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tests.influence.tiny_models import (
    VOCABULARY,
    sample_tokens,
    tiny_adapted,
    tiny_causal_lm,
    tiny_classifier,
)

IGNORED = -100
NUM_TRAIN, NUM_VALIDATION = 11, 5
BATCH_SIZE = 4

Sample = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and how its loss is taken.

    Attributes:
        name: of the case.
        build: makes the adapted model, the same every time.
        losses: the loss of every sample of a batch, [B].
        has_token_labels: whether a sample has a label for every token.
        options: what the engine's extractor is told besides.
        layers: last parts of the names of the layers to compare; empty for those of the adapter.
    """

    name: str
    build: Callable[[], nn.Module]
    losses: Callable[[nn.Module, Batch], Tensor]
    has_token_labels: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def layer_names(self, model: nn.Module) -> list[str]:
        """Name the layers to compare: named ones, or an adapter's factors and head."""
        return [
            name
            for name, module in model.named_modules()
            if (self.layers and name.rpartition(".")[2] in self.layers)
            or (
                not self.layers
                and isinstance(module, nn.Linear)
                and ("lora_" in name or ".modules_to_save." in name)
            )
        ]

    def samples(self, num_samples: int, *, seed: int) -> list[Sample]:
        """Draw samples of 2 to 20 tokens without padding."""
        token_ids, labels = sample_tokens(num_samples, seed=seed)
        return [
            {
                "input_ids": torch.tensor(ids),
                "labels": _completion(ids) if self.has_token_labels else torch.tensor(label),
            }
            for ids, label in zip(token_ids, labels, strict=True)
        ]

    @property
    def train(self) -> list[Sample]:
        return self.samples(NUM_TRAIN, seed=1)

    @property
    def validation(self) -> list[Sample]:
        return self.samples(NUM_VALIDATION, seed=2)


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """Pad on the right, as every one of the implementations gets it."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> Tensor:
        rows = [sample[name] for sample in samples]
        return torch.stack(
            [nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows]
        )

    batch = {
        "input_ids": padded("input_ids", 0),
        "attention_mask": torch.stack(
            [(torch.arange(longest) < len(sample["input_ids"])).long() for sample in samples]
        ),
    }
    if samples[0]["labels"].dim() == 0:
        return batch | {"labels": torch.stack([sample["labels"] for sample in samples])}
    return batch | {"labels": padded("labels", IGNORED)}


def batches(samples: Sequence[Sample]) -> list[Batch]:
    """Cut samples into padded batches, in their order."""
    return [
        collate_samples(samples[start : start + BATCH_SIZE])
        for start in range(0, len(samples), BATCH_SIZE)
    ]


def inputs_of(batch: Batch) -> Batch:
    """Return what the model's forward takes."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _completion(token_ids: Sequence[int]) -> Tensor:
    label_S = torch.tensor(token_ids)
    label_S[: len(token_ids) // 2] = IGNORED
    return label_S


def _classification_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits_BC = model(**inputs_of(batch)).logits
    return cross_entropy(logits_BC, batch["labels"], reduction="none")


def _completion_losses(model: nn.Module, batch: Batch) -> Tensor:
    return _token_losses(model(**inputs_of(batch)).logits, batch["labels"])


def _completion_losses_of_narrow_head(model: nn.Module, batch: Batch) -> Tensor:
    """As `_completion_losses`, but where no token is learnt the head sees zeros.

    The engine does not run the head there, so these inputs are no part of its Kronecker sums; a
    peer sums whatever its hook on the head sees. Neither loss nor gradients depend on it.
    """
    tree: Any = model
    hidden_BSH = tree.model(**inputs_of(batch)).last_hidden_state
    is_learnt_BS = nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    return _token_losses(tree.lm_head(hidden_BSH * is_learnt_BS[..., None]), batch["labels"])


def _token_losses(logits_BSV: Tensor, label_BS: Tensor) -> Tensor:
    losses = []
    for logits_SV, label_S in zip(logits_BSV, label_BS, strict=True):
        losses.append(cross_entropy(logits_SV[:-1], label_S[1:], ignore_index=IGNORED))
    return torch.stack(losses)


def _bert() -> nn.Module:
    return tiny_adapted("bert", num_layers=2)


def _llama() -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]
    )
    model: nn.Module = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _distilbert_without_biases() -> nn.Module:
    model = tiny_classifier("distilbert", num_layers=2)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    return model


BERT = Case("bert", _bert, _classification_losses, has_token_labels=False)
LLAMA = Case("llama", _llama, _completion_losses, has_token_labels=True)

FULL = Case(
    "llama-full",
    lambda: tiny_classifier("llama", num_layers=2),
    _classification_losses,
    has_token_labels=False,
    options={
        "target_modules": ["q_proj", "down_proj", "input_layernorm"],
        "word_embeddings": True,
        # so short that gradients of weights are kept as factors
        "longest": 2,
    },
    layers=("q_proj", "down_proj", "input_layernorm", "score", "embed_tokens"),
)
"""All forms of gradients: written out, factors, and rows of the vocabulary."""

_LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DISTILBERT_LAYERS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")

LINEAR = (
    Case(
        "llama-classifier-linear",
        lambda: tiny_classifier("llama", num_layers=2),
        _classification_losses,
        has_token_labels=False,
        options={"target_modules": _LLAMA_LAYERS},
        layers=(*_LLAMA_LAYERS, "score"),
    ),
    Case(
        "llama-linear",
        lambda: tiny_causal_lm("llama", num_layers=2),
        _completion_losses_of_narrow_head,
        has_token_labels=True,
        options={"target_modules": (*_LLAMA_LAYERS, "lm_head")},
        layers=(*_LLAMA_LAYERS, "lm_head"),
    ),
    Case(
        "distilbert-linear",
        _distilbert_without_biases,
        _classification_losses,
        has_token_labels=False,
        options={"target_modules": _DISTILBERT_LAYERS},
        layers=(*_DISTILBERT_LAYERS, "pre_classifier", "classifier"),
    ),
)
"""Whole weights of all linear layers, none of which has a bias."""
