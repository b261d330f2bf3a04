"""How a unit ends when it does not end well: retried, failed, cancelled, given back."""

import errno
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from torch import Tensor

from app.audits.models import Audit
from app.db import transaction
from app.work import repository as work
from app.work.models import Stage, UnitState
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace, results
from workers import tasks
from workers.influence.gradients import GradientExtractor, SampleGradients
from workers.pipeline import artifacts, run
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.gradients import compute_gradients

Meddle = Callable[[], None]


def submit(workplace: Workplace, models: Models) -> str:
    return workplace.submit(models.classifier, **workplace.reviews())


def request_cancel(engine: Engine, audit_id: str) -> None:
    with transaction(engine) as session:
        work.request_cancel(session, session.get_one(Audit, audit_id))


@pytest.fixture
def during_extract(monkeypatch: pytest.MonkeyPatch) -> Callable[[Meddle], None]:
    """Let something happen, once, while the gradients of a batch are being taken."""

    def install(meddle: Meddle) -> None:
        extract = GradientExtractor.extract
        meddlers = [meddle]

        def meddled(
            self: GradientExtractor, inputs: Mapping[str, Tensor], labels_B: Tensor
        ) -> SampleGradients:
            if meddlers:
                meddlers.pop()()
            return extract(self, inputs, labels_B)

        monkeypatch.setattr(GradientExtractor, "extract", meddled)

    return install


def test_a_poison_unit_fails_its_audit_after_some_tries_and_is_named(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(context: StageContext) -> StageOutput:
        if context.claim.position == 1:
            raise RuntimeError("something that nobody thought of")
        return compute_gradients(context)

    monkeypatch.setitem(run.STAGES, Stage.GRADIENTS, poisoned)
    audit = workplace.finish(submit(workplace, models))
    assert (audit.state, audit.error_code) == ("failed", "internal_error")
    assert audit.error_message == (
        "Stage gradients, part 1, failed 3 times: RuntimeError: something that nobody thought of."
    )
    units = {unit.position: unit for unit in workplace.units(audit.id) if unit.stage == "gradients"}
    assert units[1].attempts == workplace.settings.max_attempts
    assert units[1].state == UnitState.FAILED
    assert {unit.state for unit in units.values()} == {"done", "failed", "cancelled"}
    assert not workplace.training_rows(audit.id)


def test_a_passing_fault_costs_an_attempt_and_nothing_else(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flaky(context: StageContext) -> StageOutput:
        if context.claim.attempts < 3:
            raise OSError("the disk was away")
        return compute_gradients(context)

    expected = workplace.succeed(submit(workplace, models))
    monkeypatch.setitem(run.STAGES, Stage.GRADIENTS, flaky)
    audit = workplace.succeed(submit(workplace, models))
    assert results(audit) == results(expected)
    units = [unit for unit in workplace.units(audit.id) if unit.stage == "gradients"]
    assert {unit.attempts for unit in units} == {3}
    assert {unit.last_error for unit in units} == {"OSError: the disk was away."}


def test_cancelling_stops_the_work_at_the_next_batch(
    workplace: Workplace, models: Models, during_extract: Callable[[Meddle], None]
) -> None:
    """The heartbeat brings the news, and the unit ends without its result."""
    place = workplace.with_settings(heartbeat_seconds=0.01)
    audit_id = submit(place, models)
    claim = place.claim_stage(audit_id, Stage.GRADIENTS)

    def cancel() -> None:
        request_cancel(place.engine, audit_id)
        wait_until(lambda: tasks._held[0]._stop_reason is not None)

    during_extract(cancel)
    assert place.execute(claim) == []
    assert place.audit(audit_id).state == "cancelled"
    assert not place.artifacts(audit_id).facts(claim.position).exists()
    assert place.claim(audit_id) is None


def test_cancelling_wins_over_a_result_that_comes_too_late(
    workplace: Workplace, models: Models, during_extract: Callable[[Meddle], None]
) -> None:
    """No heartbeat came between: the commit itself looks."""
    place = workplace.with_settings(heartbeat_seconds=60)
    audit_id = submit(place, models)
    claim = place.claim_stage(audit_id, Stage.GRADIENTS)
    during_extract(lambda: request_cancel(place.engine, audit_id))
    assert place.execute(claim) == []
    assert place.audit(audit_id).state == "cancelled"
    assert place.unit(claim).state == UnitState.CANCELLED


def test_a_stopped_worker_gives_its_unit_back_without_an_attempt(
    workplace: Workplace, models: Models, during_extract: Callable[[Meddle], None]
) -> None:
    expected = workplace.succeed(submit(workplace, models))
    audit_id = submit(workplace, models)
    claim = workplace.claim_stage(audit_id, Stage.VALIDATION)

    def drain() -> None:
        tasks._held[0].drain()  # as the signal's handler does

    during_extract(drain)
    assert workplace.execute(claim) == []
    unit = workplace.unit(claim)
    assert (unit.state, unit.attempts, unit.last_error) == ("ready", 0, "its worker was stopped")
    assert results(workplace.succeed(audit_id)) == results(expected)


def test_losing_the_lease_in_the_middle_ends_the_work_and_leaves_the_heir_alone(
    workplace: Workplace, models: Models, during_extract: Callable[[Meddle], None]
) -> None:
    place = workplace.with_settings(heartbeat_seconds=0.01)
    audit_id = submit(place, models)
    claim = place.claim_stage(audit_id, Stage.GRADIENTS)
    heirs: list[Any] = []

    def take_over() -> None:
        heirs.append(place.expire(claim))
        wait_until(lambda: tasks._held[0]._stop_reason is not None)

    during_extract(take_over)
    assert place.execute(claim) == []
    unit = place.unit(claim)
    assert (unit.state, unit.owner, unit.epoch) == ("running", "another", heirs[0].epoch)
    place.execute(heirs[0])
    assert place.succeed(audit_id).summary["ranking_id"]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("stage", [Stage.FINE_TUNE, Stage.GRADIENTS, Stage.AGGREGATE])
def test_a_full_disk_costs_no_try_and_leaves_nothing(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    """The unit is given back to wait for room; then it goes on to the same result."""
    request = workplace.reviews() | {"fine_tune": {"epochs": 1}}
    quiet = workplace.succeed(workplace.submit(models.encoder, **request))
    audit_id = workplace.submit(models.encoder, **request)
    claim = workplace.claim_stage(audit_id, stage)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("workers.pipeline.artifacts.os.fsync", full)
        patch.setattr("workers.pipeline.fine_tune.os.fsync", full)
        workplace.execute(claim)
    unit = workplace.unit(claim)
    assert (unit.state, unit.attempts, unit.waiting) == (UnitState.READY, 0, "storage")
    assert workplace.audit(audit_id).waiting == "storage"
    assert list(workplace.artifacts(audit_id).root.rglob("*.partial")) == []

    audit = workplace.succeed(audit_id)
    assert audit.waiting is None
    assert results(audit) == results(quiet)


def test_an_audit_does_not_fail_of_a_disk_that_is_full_for_all(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked at before the work would say that this audit needs too much."""
    audit_id = submit(workplace, models)
    claim = workplace.claim_stage(audit_id, Stage.VALIDATION)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(workplace.settings.data_dir)._replace(free=0)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        workplace.execute(claim)
    assert workplace.unit(claim).waiting == "storage"
    workplace.succeed(audit_id)


def test_two_machines_never_write_the_same_temporary_file(tmp_path: Path) -> None:
    """Containers that share a volume may have the same process id."""
    target = tmp_path / "result"
    with artifacts.atomically(target) as one, artifacts.atomically(target) as other:
        assert one != other
        one.write_text("whole")
        other.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
