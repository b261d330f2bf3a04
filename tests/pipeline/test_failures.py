"""Every way in which an audit cannot be done says a stable code, a sentence and a field."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import delete
from transformers import FNetConfig, FNetForSequenceClassification

from app import storage
from app.audits.models import Audit
from app.datasets.models import Dataset
from app.datasets.storage import upload_path
from app.db import transaction
from app.references import InvalidReference
from tests.factories import TENANT
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import reviews, write_table
from tests.pipeline.workplace import Workplace
from workers.influence.errors import InsufficientMemory, NonFiniteInfluence
from workers.pipeline import validation
from workers.pipeline.failures import AuditRefused, failure_of, is_worth_retrying
from workers.sources.errors import SourceError

Build = Callable[[Workplace, Models], dict[str, Any]]


def failed(workplace: Workplace, audit: Audit) -> tuple[str | None, str | None, str]:
    """Return code, field and sentence; what is wrong with a request is not tried again."""
    assert audit.state == "failed", audit.state
    assert max(unit.attempts for unit in workplace.units(audit.id)) == 1
    assert audit.error_message
    return audit.error_code, audit.error_field, audit.error_message


def three(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": models.three_classes, **workplace.reviews()}


def unknown_layers(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": models.classifier, **workplace.reviews(), "ranking": {"layers": "08-15"}}


def no_such_modules(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": models.classifier, **workplace.reviews(), "target_modules": ["q_proj"]}


def no_such_modules_to_train(workplace: Workplace, models: Models) -> dict[str, Any]:
    fine_tune = {"target_modules": ["q_proj"]}
    return {"model": models.encoder, **workplace.reviews(), "fine_tune": fine_tune}


def validation_knows_more(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {
        "model": models.encoder,
        "train": workplace.table("train", reviews(20, seed=0)),
        "validation": workplace.table("more", reviews(20, seed=1, labels=("neg", "odd"))),
        "fine_tune": {},
    }


def kinds_differ(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {
        "model": models.classifier,
        "train": workplace.table("train", reviews(20, seed=0)),
        "validation": workplace.table("numbers", reviews(20, seed=1, labels=(0, 1))),
    }


def other_names(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {
        "model": models.classifier,
        "train": workplace.table("train", reviews(20, seed=0, labels=("no", "yes"))),
        "validation": workplace.table("validation", reviews(8, seed=1, labels=("no", "yes"))),
    }


def no_head(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": models.encoder, **workplace.reviews()}


def diverges(workplace: Workplace, models: Models) -> dict[str, Any]:
    # a large step is not enough: layer norms bear it; a scale that overflows is
    fine_tune = {"learning_rate": 1.0, "alpha": 4096, "rank": 1, "epochs": 20, "batch_size": 2}
    return {"model": _with_weights(workplace, models.encoder, 1e38), "fine_tune": fine_tune} | (
        workplace.reviews()
    )


def no_column(workplace: Workplace, models: Models) -> dict[str, Any]:
    data = workplace.reviews()
    data["train"]["columns"] = {"text": "review"}
    return {"model": models.classifier, **data}


def empty_text(workplace: Workplace, models: Models) -> dict[str, Any]:
    table = reviews(20, seed=0)
    table["text"][6] = " "
    return {
        "model": models.classifier,
        **workplace.reviews(),
        "validation": workplace.table("empty", table),
    }


def no_file(workplace: Workplace, models: Models) -> dict[str, Any]:
    data = workplace.reviews()
    data["validation"]["reference"] = f"file://{workplace.files}/gone.parquet"
    return {"model": models.classifier, **data}


def no_model(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": models.root / "gone", **workplace.reviews()}


def adapter_is_a_model(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": models.encoder, "adapter": models.classifier, **workplace.reviews()}


def broken_weights(workplace: Workplace, models: Models) -> dict[str, Any]:
    return {"model": _with_weights(workplace, models.classifier, torch.nan)} | workplace.reviews()


def _with_weights(workplace: Workplace, model: Path, value: float) -> Path:
    """Copy a model, with one word's embedding set to a value."""
    folder = shutil.copytree(model, workplace.files / "broken")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    weights[name][7] = value  # "great"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("build", "code", "field", "says"),
    [
        (unknown_layers, "unknown_layers", "ranking.layers", "there are all, 00, 01, CL"),
        (no_such_modules, "no_tracked_modules", "model.target_modules", "query, value"),
        (no_such_modules_to_train, "unsupported_module", "fine_tune.target_modules", "q_proj"),
        (validation_knows_more, "labels_mismatch", "validation.columns.label", "'odd'"),
        (kinds_differ, "labels_mismatch", "validation.columns.label", "integer labels"),
        (other_names, "labels_mismatch", "train.columns.label", "no, yes"),
        (three, "labels_mismatch", "train.columns.label", "bad, good, plain"),
        (no_head, "untrained_head", "model.reference", "ask for fine-tuning"),
        (diverges, "diverged", "fine_tune.learning_rate", "not finite"),
        (no_column, "missing_column", "train.columns.text", "review"),
        (empty_text, "empty_value", "validation.columns.text", "row 7"),
        (no_file, "invalid_reference", "validation.reference", "gone.parquet"),
        (no_model, "invalid_reference", "model.reference", "gone"),
        (adapter_is_a_model, "missing_file", "model.adapter", "adapter_config.json"),
        (broken_weights, "non_finite_influence", "model.reference", "validation samples"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_request_that_cannot_be_done_says_what_to_change(
    workplace: Workplace, models: Models, *, build: Build, code: str, field: str | None, says: str
) -> None:
    found_code, found_field, message = failed(
        workplace.with_settings(file_roots=(*workplace.settings.file_roots, workplace.files)),
        workplace.finish(workplace.submit(**build(workplace, models))),
    )
    assert (found_code, found_field) == (code, field), message
    assert says in message
    assert message.endswith((".", ")")) or ": " in message


def test_samples_that_break_the_numbers_are_named(workplace: Workplace, models: Models) -> None:
    """The rows of the user's file, whatever batch and shard they fell into."""
    table = reviews(30, seed=0)
    table["text"] = [text.replace("great", "good") for text in table["text"]]
    clean = reviews(8, seed=1)
    clean["text"] = [text.replace("great", "good") for text in clean["text"]]
    table["text"][4] += " great"
    table["text"][21] += " great"
    broken = _with_weights(workplace, models.classifier, torch.nan)
    sets: dict[str, Any] = {
        "train": workplace.table("train", table),
        "validation": workplace.table("validation", clean),
        "ranking": {"estimator": "grad_dot", "aggregation": "mean"},
    }
    code, field, message = failed(workplace, workplace.finish(workplace.submit(broken, **sets)))
    assert (code, field) == ("non_finite_influence", "model.reference")
    assert "2 of 30 training samples is not finite (rows 4, 21)" in message

    audit = workplace.succeed(workplace.submit(broken, **sets, max_nonfinite_fraction=0.1))
    first, second, *others = workplace.ranked_rows(audit.id)
    assert [first.sample_index, second.sample_index] == [4, 21]
    assert first.score == second.score < others[0].score
    assert audit.summary["num_non_finite"] == 2
    assert any("rows 4, 21" in warning for warning in audit.summary["warnings"])
    marked = [row.sample_index for row in workplace.training_rows(audit.id) if row.non_finite]
    assert marked == [4, 21]
    for row in workplace.training_rows(audit.id):
        neighbours = [*(row.alike_training or ()), *(row.opposed_training or ())]
        assert not {4, 21} & set(neighbours)
        assert bool(neighbours) != row.non_finite
        assert (row.class_probabilities is None) == row.non_finite
    # the others stand as they would without them
    rest = {name: [v for i, v in enumerate(table[name]) if i not in {4, 21}] for name in table}
    without = workplace.succeed(
        workplace.submit(broken, **{**sets, "train": workplace.table("rest", rest)})
    )
    order = [i for i in range(30) if i not in {4, 21}]
    assert [order[row.sample_index] for row in workplace.ranked_rows(without.id)] == [
        row.sample_index for row in others
    ]


def test_an_upload_that_is_gone_is_named(workplace: Workplace, models: Models) -> None:
    """It was there when the audit was accepted."""
    dataset_id = "ds_" + "0" * 32
    path = upload_path(workplace.settings.data_dir, dataset_id, "parquet")
    path.parent.mkdir(parents=True)
    write_table(path, reviews(20, seed=0))
    with transaction(workplace.engine) as session:
        session.add(
            Dataset(
                id=dataset_id,
                tenant=TENANT,
                name="train.parquet",
                format="parquet",
                columns={"text": "text", "label": "label"},
                num_rows=20,
                num_bytes=path.stat().st_size,
                sha256="0" * 64,
                summary={},
            )
        )
    request = workplace.reviews() | {"train": {"reference": f"upload:{dataset_id}"}}
    audit = workplace.succeed(workplace.submit(models.classifier, **request))
    assert audit.provenance["train_revision"] == "0" * 64

    with transaction(workplace.engine) as session:
        session.execute(delete(Dataset))
    code, field, message = failed(
        workplace, workplace.finish(workplace.submit(models.classifier, **request))
    )
    assert (code, field) == ("not_found", "train.reference")
    assert "upload the file again" in message


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_too_little_room_is_said_before_the_work(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch, resource: str
) -> None:
    if resource == "memory":
        monkeypatch.setattr(validation, "free_bytes", lambda _: 10_000)
    else:
        usage = shutil.disk_usage(workplace.settings.data_dir)._replace(free=1000)
        monkeypatch.setattr("workers.pipeline.validation.shutil.disk_usage", lambda _: usage)
        monkeypatch.setattr(storage, "LEAST_FREE_BYTES", 1000)  # it is not full for everybody
    code, _, message = failed(
        workplace, workplace.finish(workplace.submit(models.classifier, **workplace.reviews()))
    )
    assert code == "insufficient_memory"
    assert "validation samples" in message


def test_weights_that_change_after_the_check_are_noticed(
    workplace: Workplace, models: Models
) -> None:
    folder = shutil.copytree(models.classifier, workplace.files / "moving")
    audit_id = workplace.submit(folder, **workplace.reviews())
    first = workplace.claim(audit_id)
    assert first is not None
    workplace.execute(first)
    (folder / "model.safetensors").write_bytes(b"something else")
    code, field, message = failed(workplace, workplace.finish(audit_id))
    assert (code, field) == ("changed_file", "model.reference")
    assert "submit the audit again" in message


def test_a_model_without_attention_must_be_told_its_modules(
    workplace: Workplace, models: Models
) -> None:
    """FNet mixes tokens by Fourier transforms: there is no query to find."""
    folder = shutil.copytree(models.classifier, workplace.files / "fnet")
    torch.manual_seed(0)
    fnet = FNetConfig(
        vocab_size=30, max_position_embeddings=24, hidden_size=16, num_hidden_layers=2,
        intermediate_size=16, pad_token_id=0,
    )  # fmt: skip
    for path in folder.glob("*.safetensors"):
        path.unlink()
    FNetForSequenceClassification(fnet).save_pretrained(folder)
    code, field, message = failed(
        workplace,
        workplace.finish(workplace.submit(folder, **workplace.reviews(), fine_tune={"epochs": 1})),
    )
    assert (code, field) == ("no_tracked_modules", "fine_tune.target_modules")
    assert "dense" in message


def test_only_what_time_can_heal_is_tried_again() -> None:
    hub_away = SourceError("down", code="hub_unreachable", field="model", transient=True)
    healing: list[Exception] = [hub_away, OSError("disk"), RuntimeError("?"), ConnectionError()]
    lasting: list[Exception] = [
        SourceError("gone", code="not_found", field="model"),
        AuditRefused("diverged", "The loss is not finite."),
        InvalidReference("no"),
        InsufficientMemory("no"),
        NonFiniteInfluence("the loss", positions=[1]),
        torch.OutOfMemoryError("no"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ]
    assert all(is_worth_retrying(error) for error in healing)
    assert not any(is_worth_retrying(error) for error in lasting)
    again = AuditRefused("hub_unreachable", "Down.", field="train.reference", transient=True)
    assert is_worth_retrying(again)
    assert failure_of(again).field == "train.reference"
    assert failure_of(hub_away).field == "model.reference"
    assert failure_of(InvalidReference("no")).code == "invalid_reference"
    assert failure_of(ValueError("odd")).code == "internal_error"
