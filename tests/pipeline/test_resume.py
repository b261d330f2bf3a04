"""Work that is interrupted anywhere and done again gives the same bytes."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.orm import Session
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import BertForSequenceClassification, get_linear_schedule_with_warmup

from app.audits.models import Audit, Ranking
from app.db import transaction
from app.work import repository as work
from app.work.claims import Claim
from app.work.models import Stage
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import bert_config, reviews
from tests.pipeline.workplace import Workplace, interrupted, results
from workers.pipeline.checkpoint import Position, load_checkpoint, save_checkpoint, trainable

FINE_TUNE = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 8, "dropout": 0.2}


@pytest.fixture
def submit(workplace: Workplace, models: Models) -> Callable[[], str]:
    """Submit one and the same audit with every stage in it."""
    data = workplace.reviews(num_train=30, num_validation=8)
    data["test"] = workplace.table("test", reviews(9, seed=2))
    return lambda: workplace.submit(
        models.encoder,
        **data,
        fine_tune=FINE_TUNE,
        plant_noise={"fraction": 0.2},
        estimators=["grad_dot", "tracin", "gauss_newton", "ekfac", "outlier_gradient", "repsim"],
        aggregations=["mean", "rank", "vote", "common_set"],
        ranking={"estimator": "auto", "layers": "auto", "aggregation": "auto"},
        verify={"seeds": [0, 1], "arms": ["random"], "rankings": [{"estimator": "tracin"}]},
    )


def adapter_bytes(workplace: Workplace, audit_id: str) -> dict[str, str]:
    folder = workplace.artifacts(audit_id).adapter
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_fine_tuning_stopped_at_any_step_goes_on_to_the_bit(
    workplace: Workplace, submit: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, losses and epochs are the same, wherever the one interruption was."""
    quiet = submit()
    workplace.execute(workplace.claim_stage(quiet, Stage.FINE_TUNE))
    expected = adapter_bytes(workplace, quiet)
    losses = workplace.audit(quiet).provenance["validation_losses"]

    tick, was_interrupted = 0, True
    while was_interrupted:
        tick += 1
        audit_id = submit()
        claim = workplace.claim_stage(audit_id, Stage.FINE_TUNE)
        with interrupted(monkeypatch, tick=tick):
            was_interrupted = not workplace.execute(claim)
        torch.manual_seed(tick)  # the next worker is another process
        if was_interrupted:
            again = workplace.claim_stage(audit_id, Stage.FINE_TUNE)
            assert again.attempts == 1, "being stopped counts as no attempt"
            workplace.execute(again)
        assert adapter_bytes(workplace, audit_id) == expected, f"interrupted at tick {tick}"
        assert workplace.audit(audit_id).provenance["validation_losses"] == losses
    assert tick > 3 * 4, "every step of every epoch was an interruption of its own"


def test_fine_tuning_that_is_stopped_again_and_again_ends(
    workplace: Workplace, submit: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker gets as far as a checkpoint, and the results are those of an undisturbed run."""
    expected = results(workplace.succeed(submit()))
    audit_id = submit()
    claim = workplace.claim_stage(audit_id, Stage.FINE_TUNE)
    stops = 0
    while claim.stage is Stage.FINE_TUNE:
        with interrupted(monkeypatch, tick=5):
            workplace.execute(claim)
        stops += 1
        following = workplace.claim(audit_id)
        assert following is not None
        claim = following
    assert stops > 3
    workplace.execute(claim)
    assert results(workplace.succeed(audit_id)) == expected


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_an_audit_that_is_stopped_again_and_again_in_every_stage_gives_the_same_files(
    workplace: Workplace,
    submit: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    cache_bytes: int,
) -> None:
    """A unit is stopped soon after it began, with the next worker a little later, and so on."""

    def tick(stage: Stage, number: int) -> int:
        return {Stage.CHECKPOINTS: number, Stage.CURVATURE: 3 * number}.get(stage, 1 << number - 1)

    place = workplace.with_settings(max_gradient_cache_bytes=cache_bytes)
    expected = place.succeed(submit())
    audit_id = submit()
    workers: Counter[str] = Counter()
    stops: Counter[Stage] = Counter()
    while claim := place.claim(audit_id):
        workers[claim.unit_id] += 1
        with interrupted(monkeypatch, tick=tick(claim.stage, workers[claim.unit_id])):
            place.execute(claim)
        stops[claim.stage] += place.unit(claim).state != "done"
    assert set(stops) == {*Stage} - {Stage.RANK}
    assert stops[Stage.CHECKPOINTS] >= 3 * 2 * 2, "epochs, shards, batches"
    num_modules = expected.provenance["num_modules"]
    assert stops[Stage.CURVATURE] >= num_modules, "in the middle of every module"
    assert min(stops.values()) > 0, stops
    audit = place.audit(audit_id)
    assert audit.provenance["keeps_gradients"] == (cache_bytes > 0)
    assert audit.provenance["num_module_blocks"] == (2 if cache_bytes else num_modules)
    check_same(place, audit, expected)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_every_unit_may_be_done_twice(
    workplace: Workplace,
    submit: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    cache_bytes: int,
) -> None:
    """Each first attempt writes its files and dies before the commit."""
    workplace = workplace.with_settings(max_gradient_cache_bytes=cache_bytes)
    expected = workplace.succeed(submit())
    complete = work.complete

    def dying(session: Session, held: Claim, *, result: dict[str, Any]) -> list[str]:
        if held.attempts == 1:
            raise ConnectionError("the worker died here")
        return complete(session, held, result=result)

    monkeypatch.setattr(work, "complete", dying)
    audit = workplace.succeed(submit())
    assert {unit.attempts for unit in workplace.units(audit.id)} == {2}
    check_same(workplace, audit, expected)


def test_a_zombie_changes_nothing(workplace: Workplace, submit: Callable[[], str]) -> None:
    """At every unit a worker freezes, another one takes over, and the first wakes up and ends.

    It writes the same files, and its commit is refused.
    """
    expected = workplace.succeed(submit())
    audit_id = submit()
    while zombie := workplace.claim(audit_id):
        heir = workplace.expire(zombie)
        before = workplace.audit(audit_id)
        assert workplace.execute(zombie) == []
        after = workplace.audit(audit_id)
        assert (after.provenance, after.summary) == (before.provenance, before.summary)
        assert workplace.unit(heir).epoch == heir.epoch
        assert workplace.unit(heir).state == "running"
        workplace.execute(heir)
        assert workplace.unit(heir).state == "done"
        assert workplace.execute(zombie) == []
        assert workplace.unit(heir).state == "done"
    check_same(workplace, workplace.audit(audit_id), expected)


def check_same(workplace: Workplace, audit: Audit, expected: Audit) -> None:
    assert audit.state == "succeeded", audit.error_message
    assert results(audit) == results(expected)
    assert audit.summary["configurations"] == expected.summary["configurations"]
    assert audit.summary["cancellation"] == expected.summary["cancellation"]
    assert audit.summary["verification"] == expected.summary["verification"]
    with transaction(workplace.engine) as session:
        assert session.query(Ranking).where(Ranking.audit_id == audit.id).count() == 1
    assert len(workplace.training_rows(audit.id)) == audit.num_train


def test_a_checkpoint_gives_everything_back(tmp_path: Path) -> None:
    """The steps after a load are those that would have followed the save, random numbers too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def start(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = BertForSequenceClassification(bert_config()).to(device)
        model.bert.embeddings.requires_grad_(requires_grad=False)
        optimizer = AdamW(trainable(model).values(), lr=1e-2)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, 9)
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "device": device}

    def step(parts: dict[str, Any]) -> None:
        parts["model"].train()
        inputs = torch.tensor([[2, 5, 9, 3], [2, 6, 12, 3]], device=device)
        logits = parts["model"](input_ids=inputs).logits
        parts["optimizer"].zero_grad()
        cross_entropy(logits, torch.tensor([0, 1], device=device)).backward()
        parts["optimizer"].step()
        parts["schedule"].step()

    first = start(0)
    for _ in range(3):
        step(first)
    best = {name: value.detach().clone() for name, value in trainable(first["model"]).items()}
    position = Position(step=3, best_loss=0.1 + 0.2, best=best, losses=(1 / 3, 0.1 + 0.2))
    save_checkpoint(tmp_path / "checkpoint.safetensors", position, **first)
    for _ in range(3):
        step(first)

    second = start(1)
    loaded = load_checkpoint(tmp_path / "checkpoint.safetensors", **second)
    # the frozen part is no part of the checkpoint: it is loaded with the model
    second["model"].bert.embeddings.load_state_dict(first["model"].bert.embeddings.state_dict())
    assert (loaded.step, loaded.best_loss, loaded.losses) == (3, 0.1 + 0.2, (1 / 3, 0.1 + 0.2))
    for name, value in best.items():
        assert torch.equal(loaded.best[name].to(device), value)
    for _ in range(3):
        step(second)
    for name, value in trainable(first["model"]).items():
        assert torch.equal(trainable(second["model"])[name], value), name
    assert second["schedule"].get_last_lr() == first["schedule"].get_last_lr()
