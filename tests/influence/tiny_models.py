"""Tiny random models of several families, as classifiers and causal LMs, and samples for them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
)

from workers.influence.objectives import IGNORED

NUM_CLASSES = 3
VOCABULARY = 60

FAMILIES: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
}
"""The query and value projections by family."""

CAUSAL_FAMILIES = ("gpt2", "llama", "qwen3", "mistral")

Task = Literal["classification", "causal_lm"]


def tiny_config(family: str, *, num_layers: int = 3, **options: Any) -> PretrainedConfig:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": NUM_CLASSES}
    if family == "distilbert":
        common |= {"n_layers": num_layers, "dim": 32, "hidden_dim": 64, "n_heads": 4}
        return DistilBertConfig(**common | {"max_position_embeddings": 40} | options)
    common |= {"pad_token_id": 0, "tie_word_embeddings": False}
    if family == "gpt2":
        common |= {"n_layer": num_layers, "n_embd": 32, "n_head": 4, "n_positions": 40}
        return GPT2Config(**common | {"bos_token_id": 1, "eos_token_id": 1} | options)
    common |= {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    }
    if family == "bert":
        return BertConfig(**common | options)
    if family == "roberta":
        # RoBERTa pads with 1 and counts positions from there
        return RobertaConfig(**common | options)
    common |= {"num_key_value_heads": 2}
    kinds = {"qwen3": Qwen3Config, "mistral": MistralConfig, "llama": LlamaConfig}
    head_size = {"head_dim": 8} if family == "qwen3" else {}
    return kinds[family](**common | head_size | options)


def tiny_classifier(
    family: str, *, num_layers: int = 3, seed: int = 0, **options: Any
) -> nn.Module:
    torch.manual_seed(seed)
    config = tiny_config(family, num_layers=num_layers, **options)
    return _lively(AutoModelForSequenceClassification.from_config(config))


def tiny_causal_lm(family: str, *, num_layers: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = tiny_config(family, num_layers=num_layers, **options)
    return _lively(AutoModelForCausalLM.from_config(config))


def tiny_model(task: Task, family: str, **options: Any) -> nn.Module:
    make = tiny_classifier if task == "classification" else tiny_causal_lm
    return make(family, **options)


def _lively(model: nn.Module) -> nn.Module:
    # the initial weights are so small that gradients hardly differ between samples
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


def tiny_adapted(
    family: str,
    *,
    task: Task = "classification",
    num_layers: int = 3,
    seed: int = 0,
    base: nn.Module | None = None,
    **lora: Any,
) -> nn.Module:
    """A tiny model with a LoRA adapter whose factors are both nonzero."""
    if base is None:
        base = tiny_model(task, family, num_layers=num_layers, seed=seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(FAMILIES[family])} | lora
    task_type = "SEQ_CLS" if task == "classification" else "CAUSAL_LM"
    options["fan_in_fan_out"] = family == "gpt2"
    model: nn.Module = get_peft_model(base, LoraConfig(task_type=task_type, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.2)
        if "lora_magnitude_vector" in name:
            # away from the length of the weights, as after training
            with torch.no_grad():
                parameter.mul_(torch.linspace(0.7, 1.4, len(parameter)))
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


def sample_completions(num_samples: int, *, seed: int = 0) -> tuple[list[list[int]], list[Any]]:
    """The tokens of `sample_tokens`; labels are the tokens of the second half, else ignored."""
    token_ids, _ = sample_tokens(num_samples, seed=seed)
    labels = [
        [IGNORED] * (len(ids) - max(1, len(ids) // 2)) + ids[-max(1, len(ids) // 2) :]
        for ids in token_ids
    ]
    return token_ids, labels


def samples_for(
    task: Task, num_samples: int, *, seed: int = 0
) -> tuple[list[list[int]], list[Any]]:
    make = sample_tokens if task == "classification" else sample_completions
    return make(num_samples, seed=seed)


def pad_targets(labels: Sequence[Any], *, device: torch.device, left: bool = False) -> Tensor:
    """Labels as a batch takes them: class indices, or token labels padded like the tokens."""
    if isinstance(labels[0], int):
        return torch.tensor(labels, device=device)
    width = max(len(row) for row in labels)
    rows = []
    for row in labels:
        padding = [IGNORED] * (width - len(row))
        rows.append(padding + row if left else row + padding)
    return torch.tensor(rows, device=device)
