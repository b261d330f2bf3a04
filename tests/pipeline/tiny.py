"""Tiny models with random weights and small labelled tables, as folders and files of a user."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

GOOD = ["good", "fine", "great", "warm"]
BAD = ["bad", "dull", "poor", "cold"]
OTHER = ["film", "plot", "actor", "scene", "music", "a", "the", "and", "with", "very"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
MAX_POSITIONS = 24

LANGUAGE_VOCABULARY = ["<unk>", "<s>", "</s>", "user", "assistant", "system", *VOCABULARY[5:]]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s> {{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
MAX_LANGUAGE_POSITIONS = 48


def bert_config(*, num_labels: int = 2, num_layers: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_POSITIONS,
        num_labels=num_labels,
    )


def save_bert(folder: Path, *, labels: Sequence[str] = ("neg", "pos"), num_layers: int = 2) -> Path:
    """Save a trained-looking BERT classifier whose config names its classes."""
    torch.manual_seed(0)
    config = bert_config(num_labels=len(labels), num_layers=num_layers)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    model = BertForSequenceClassification(config)
    _enlarge(model)
    return _save(model, folder)


def save_encoder(folder: Path) -> Path:
    """Save a BERT without a head, to be fine-tuned."""
    torch.manual_seed(1)
    model = BertForSequenceClassification(bert_config())
    _enlarge(model)
    return _save(model.bert, folder)


def save_distilbert(folder: Path) -> Path:
    """Save a DistilBERT classifier without names for its three classes."""
    torch.manual_seed(2)
    config = DistilBertConfig(
        vocab_size=len(VOCABULARY),
        n_layers=3,
        dim=16,
        hidden_dim=32,
        n_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        num_labels=3,
    )
    model = DistilBertForSequenceClassification(config)
    _enlarge(model)
    return _save(model, folder)


def save_adapter(folder: Path, *, base: Path, num_labels: int = 2) -> Path:
    """Save a LoRA adapter with a head for an encoder, both factors nonzero."""
    torch.manual_seed(3)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    adapted = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if name.endswith("classifier.modules_to_save.default.weight"):
            nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return folder


def llama_config(**changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": len(LANGUAGE_VOCABULARY),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": MAX_LANGUAGE_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**options | changes)


def gpt2_config(**changes: Any) -> GPT2Config:
    options: dict[str, Any] = {
        "vocab_size": len(LANGUAGE_VOCABULARY),
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": MAX_LANGUAGE_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2Config(**options | changes)


def save_language_model(
    folder: Path, config: PretrainedConfig, *, template: str | None = CHAT_TEMPLATE, seed: int = 4
) -> Path:
    """Save a causal language model with random weights, and a tokenizer of whole words."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    _enlarge(model)
    model.save_pretrained(folder)
    save_language_tokenizer(folder, template=template)
    return folder


def save_language_tokenizer(folder: Path, *, template: str | None = CHAT_TEMPLATE) -> None:
    """Save a tokenizer of whole words, with a chat template or without; it has no padding token."""
    words = {word: number for number, word in enumerate(LANGUAGE_VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_llama(folder: Path, *, template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    return save_language_model(folder, llama_config(**changes), template=template)


def save_gpt2(folder: Path, *, template: str | None = None, **changes: Any) -> Path:
    """Its tokenizer has no chat template, as GPT-2's has none."""
    return save_language_model(folder, gpt2_config(**changes), template=template)


def save_language_adapter(
    folder: Path, *, base: Path, target_modules: Sequence[str] = ("q_proj", "v_proj"), seed: int = 5
) -> Path:
    """Save a LoRA adapter for a causal language model, both factors nonzero."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            lora_alpha=4,
            target_modules=list(target_modules),
            fan_in_fan_out="c_attn" in target_modules,
        ),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def _enlarge(model: nn.Module) -> None:
    # the initial weights are so small that gradients hardly differ between samples
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def reviews(number: int, *, seed: int, labels: Sequence[Any] = ("neg", "pos")) -> dict[str, Any]:
    """Make up short texts whose words tell the label, most of the time."""
    draw = random.Random(seed)
    texts, given = [], []
    for _ in range(number):
        label = draw.randrange(len(labels))
        telling = (BAD, GOOD, OTHER)[label % 3]
        words = draw.choices(OTHER, k=draw.randint(1, 9)) + draw.choices(telling, k=2)
        draw.shuffle(words)
        texts.append(" ".join(words))
        given.append(labels[label])
    return {"text": texts, "label": given}


def instructions(number: int, *, seed: int) -> dict[str, Any]:
    """Make up prompts, and completions that follow from their first word, most of the time."""
    draw = random.Random(seed)
    prompts, completions = [], []
    for _ in range(number):
        telling = draw.randrange(2)
        words = [draw.choice((BAD, GOOD)[telling]), *draw.choices(OTHER, k=draw.randint(1, 6))]
        prompts.append(" ".join(words))
        completions.append(" ".join(draw.choices((BAD, GOOD)[telling], k=draw.randint(1, 4))))
    return {"prompt": prompts, "completion": completions}


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path
