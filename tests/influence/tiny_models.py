"""Tiny random classifiers of several families, and samples for them."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

NUM_CLASSES = 3
VOCABULARY = 60

FAMILIES: dict[str, tuple[str, str]] = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "llama": ("q_proj", "v_proj"),
}
"""The query and value projections by family."""


def tiny_config(family: str, *, num_layers: int = 3) -> PretrainedConfig:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": NUM_CLASSES}
    if family == "distilbert":
        return DistilBertConfig(
            n_layers=num_layers,
            dim=32,
            hidden_dim=64,
            n_heads=4,
            max_position_embeddings=40,
            **common,
        )
    common |= {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    }
    if family == "bert":
        return BertConfig(**common)
    if family == "roberta":
        # RoBERTa pads with 1 and counts positions from there
        return RobertaConfig(pad_token_id=0, **common)
    return LlamaConfig(num_key_value_heads=2, pad_token_id=0, **common)


def tiny_classifier(family: str, *, num_layers: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = tiny_config(family, num_layers=num_layers)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    # the initial weights are so small that gradients hardly differ between samples
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


def tiny_adapted(
    family: str, *, num_layers: int = 3, seed: int = 0, base: nn.Module | None = None, **lora: Any
) -> nn.Module:
    """A tiny classifier with a LoRA adapter whose factors are both nonzero."""
    base = tiny_classifier(family, num_layers=num_layers, seed=seed) if base is None else base
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(FAMILIES[family])} | lora
    model: nn.Module = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def sample_tokens(num_samples: int, *, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Token ids of 2 to 20 tokens without padding (0), and labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 21, (num_samples,), generator=generator).tolist()
    token_ids = [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]
    labels = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator).tolist()
    return token_ids, labels
