"""Tiny models with random weights, and a hub to fetch them from."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

from app.references import FileReference, HubModelReference
from tests.hub import LoopbackHub, loopback_hub
from workers.sources.hub import Hub
from workers.sources.libraries import Task
from workers.sources.models import ResolvedModel, resolve_model

Resolve = Callable[..., ResolvedModel]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


def tiny_config(*, num_labels: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=num_labels,
    )


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


@pytest.fixture
def classifier_folder(tmp_path: Path) -> Path:
    """A fully fine-tuned classifier of two unnamed classes."""
    folder = tmp_path / "models" / "classifier"
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_config()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    """An encoder without a classification head."""
    folder = tmp_path / "models" / "encoder"
    torch.manual_seed(1)
    BertModel(tiny_config()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def adapter_folder(tmp_path: Path, encoder_folder: Path) -> Path:
    """A LoRA adapter with a head of three classes, for the encoder."""
    folder = tmp_path / "models" / "adapter"
    base = BertForSequenceClassification.from_pretrained(encoder_folder, num_labels=3)
    torch.manual_seed(2)
    adapted = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test, and no library under it, may call anywhere but the loopback hub."""
    strangers: list[object] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            strangers.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    yield
    assert strangers == []


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with loopback_hub() as running:
        yield running


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub(endpoint=server.endpoint, cache_dir=tmp_path / "hub")


@pytest.fixture
def resolve(tmp_path: Path, hub: Hub) -> Resolve:
    """Resolve folders below tmp_path/models, and what the loopback hub has."""

    def resolve(
        model: Path | HubModelReference,
        adapter: Path | HubModelReference | None = None,
        task: Task = "classification",
    ) -> ResolvedModel:
        return resolve_model(
            FileReference(model) if isinstance(model, Path) else model,
            adapter=FileReference(adapter) if isinstance(adapter, Path) else adapter,
            task=task,
            roots=[tmp_path / "models"],
            hub=hub,
            cache_dir=tmp_path / "cache",
        )

    return resolve
