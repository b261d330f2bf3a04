"""Without a validation set a part of the training set stands in for one."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from app.audits.models import Audit
from app.work.models import Stage
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.test_automatic_audits import rows_of
from tests.pipeline.test_probes_in_audits import AUTO
from tests.pipeline.workplace import Workplace, interrupted, results
from workers.pipeline import splitting
from workers.pipeline.artifacts import read_tensors

FINE_TUNE = {"epochs": 1, "learning_rate": 1e-2, "batch_size": 8}
TRAIN = tiny.reviews(40, seed=0)
Table = dict[str, list[Any]]


@pytest.fixture
def submit(workplace: Workplace, models: Models) -> Callable[..., str]:
    def submit(table: Table = TRAIN, **request: Any) -> str:
        options: dict[str, Any] = {
            "fine_tune": FINE_TUNE,
            "estimators": ["grad_dot", "datainf"],
            "ranking": AUTO,
            "flag": "auto",
        }
        model = models.llama if request.get("task") == "causal_lm" else models.encoder
        train = workplace.table("train", table)
        return workplace.submit(model, train=train, **{**options, **request})

    return submit


def held_out(workplace: Workplace, audit_id: str) -> list[int]:
    indices = read_tensors(workplace.artifacts(audit_id).held_out)["index"].tolist()
    assert indices == sorted(set(indices))
    return list(indices)


def adapter_of(workplace: Workplace, audit_id: str) -> str:
    """Return the digest of what fine-tuning learned."""
    path = workplace.artifacts(audit_id).adapter / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fine_tuned(workplace: Workplace, audit_id: str) -> str:
    workplace.execute(workplace.claim_stage(audit_id, Stage.FINE_TUNE))
    return adapter_of(workplace, audit_id)


def with_labels_turned(table: Table, indices: list[int]) -> Table:
    turned = {"neg": "pos", "pos": "neg"}
    labels = [
        turned[label] if index in indices else label for index, label in enumerate(table["label"])
    ]
    return table | {"label": labels}


def the_warnings(audit: Audit) -> list[str]:
    return [text for text in audit.summary["warnings"] if "No validation set was named" in text]


def test_a_part_is_held_out_and_ranked_all_the_same(
    workplace: Workplace, submit: Callable[..., str]
) -> None:
    audit = workplace.succeed(submit())
    indices = held_out(workplace, audit.id)
    assert len(indices) == audit.num_validation == audit.provenance["num_split"] == 8
    assert [row.text for row in workplace.validation_rows(audit.id)] == [
        TRAIN["text"][index] for index in indices
    ]
    assert [row.given_label for row in workplace.validation_rows(audit.id)] == [
        TRAIN["label"][index] for index in indices
    ]
    assert len(rows_of(workplace, audit)) == 40
    (warning,) = the_warnings(audit)
    assert "so 8 training samples stand in for one" in warning
    assert audit.provenance["validation_revision"] is None


def test_fine_tuning_does_not_see_what_is_held_out(
    workplace: Workplace, submit: Callable[..., str]
) -> None:
    """After one epoch, when there is none to choose by the validation loss."""
    audit_id = submit()
    expected = fine_tuned(workplace, audit_id)
    indices = held_out(workplace, audit_id)
    others = [index for index in range(40) if index not in indices]
    assert fine_tuned(workplace, submit(with_labels_turned(TRAIN, indices))) == expected
    assert fine_tuned(workplace, submit(with_labels_turned(TRAIN, others[:1]))) != expected


def test_the_seed_decides_the_part_alone(
    workplace: Workplace, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does the work, and however often it is interrupted."""
    one = workplace.succeed(submit())
    again = workplace.with_settings(samples_per_shard=7).succeed(submit())
    assert held_out(workplace, one.id) == held_out(workplace, again.id)
    assert results(one) == results(again)
    audit_id = submit()
    claim = workplace.claim_stage(audit_id, Stage.PREPARE)
    with interrupted(monkeypatch, tick=2):
        assert not workplace.execute(claim)
    assert results(workplace.succeed(audit_id)) == results(one)
    other_id = submit(seed=1)
    workplace.claim_stage(other_id, Stage.FINE_TUNE)
    assert held_out(workplace, other_id) != held_out(workplace, one.id)


def test_a_large_training_set_gives_so_many_at_most(
    workplace: Workplace, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MAX_SPLIT", 5)
    monkeypatch.setattr(splitting, "_ROWS", 2)
    audit_id = submit()
    workplace.claim_stage(audit_id, Stage.FINE_TUNE)
    assert len(held_out(workplace, audit_id)) == workplace.audit(audit_id).num_validation == 5


def test_where_nothing_needs_a_validation_set_nothing_is_held_out(
    workplace: Workplace, submit: Callable[..., str]
) -> None:
    fixed = {"estimator": "self_influence", "layers": "all", "aggregation": "mean"}
    audit = workplace.succeed(
        submit(estimators=["self_influence"], ranking=fixed, flag={"count": 1})
    )
    assert not workplace.artifacts(audit.id).held_out.exists()
    assert audit.num_validation == 0
    assert the_warnings(audit) == []


def test_a_set_that_is_named_is_taken(workplace: Workplace, submit: Callable[..., str]) -> None:
    table = workplace.table("validation", tiny.reviews(6, seed=3))
    audit = workplace.succeed(submit(validation=table))
    assert audit.num_validation == 6
    assert not workplace.artifacts(audit.id).held_out.exists()
    assert the_warnings(audit) == []


def test_completions_and_models_that_are_fine_tuned_already(
    workplace: Workplace, submit: Callable[..., str], models: Models
) -> None:
    language = workplace.succeed(submit(tiny.instructions(20, seed=0), task="causal_lm"))
    assert language.num_validation == 4
    assert len(rows_of(workplace, language)) == 20
    assert len(the_warnings(language)) == 1
    train = workplace.table("train", TRAIN)
    finished = workplace.succeed(
        workplace.submit(models.classifier, train=train, ranking=AUTO, flag="auto")
    )
    assert finished.num_validation == 8
    assert len(the_warnings(finished)) == 1
    rows_of(workplace, finished)
