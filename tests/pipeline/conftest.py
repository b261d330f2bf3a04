"""A worker in this process, tiny models and small tables."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.settings import Settings
from tests.pipeline import tiny
from tests.pipeline.workplace import Workplace


@dataclass(frozen=True)
class Models:
    """Folders of models."""

    root: Path
    encoder: Path
    adapter: Path
    three_class_adapter: Path
    classifier: Path
    three_classes: Path
    distilbert: Path
    llama: Path
    llama_adapter: Path
    gpt2: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    encoder = tiny.save_encoder(root / "encoder")
    llama = tiny.save_llama(root / "llama")
    return Models(
        root=root,
        encoder=encoder,
        adapter=tiny.save_adapter(root / "adapter", base=encoder),
        three_class_adapter=tiny.save_adapter(root / "adapter3", base=encoder, num_labels=3),
        classifier=tiny.save_bert(root / "classifier"),
        three_classes=tiny.save_bert(root / "three", labels=("bad", "good", "plain")),
        distilbert=tiny.save_distilbert(root / "distilbert"),
        llama=llama,
        llama_adapter=tiny.save_language_adapter(root / "llama_adapter", base=llama),
        gpt2=tiny.save_gpt2(root / "gpt2"),
    )


@pytest.fixture
def workplace(engine: Engine, settings: Settings, models: Models) -> Workplace:
    """Small shards and batches, so that even a small audit has several of both."""
    (files,) = settings.file_roots
    changed = settings.model_copy(
        update={
            "file_roots": (files, models.root),
            "samples_per_shard": 20,
            "tokens_per_batch": 96,
            "checkpoint_steps": 2,
            "device": "auto",
        }
    )
    return Workplace(engine, changed, files)
