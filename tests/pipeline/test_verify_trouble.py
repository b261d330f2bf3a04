"""Verifications that are interrupted, cancelled, or have odd arms and sets."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from app.audits.models import Audit
from app.db import transaction
from app.work import repository as work
from app.work.models import Stage
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.verifying import FINE_TUNE, TEST, TRAIN, arms_of, submit_reviews
from tests.pipeline.workplace import Workplace, interrupted, results
from workers.pipeline.training import Diverged, train


@pytest.fixture
def submit(workplace: Workplace, models: Models) -> Callable[..., str]:
    return partial(submit_reviews, workplace, models)


class TestInterrupted:
    VERIFY: ClassVar[dict[str, Any]] = {"seeds": [2], "arms": ["relabelled"]}

    def outcome(self, workplace: Workplace, audit_id: str) -> bytes:
        return workplace.artifacts(audit_id).outcome(0).read_bytes()

    def test_stopped_at_any_step_it_goes_on_to_the_bit(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        request = {"verify": self.VERIFY, "fine_tune": FINE_TUNE | {"epochs": 2}}
        quiet = workplace.succeed(submit(**request))
        expected = self.outcome(workplace, quiet.id)
        tick, was_interrupted = 0, True
        while was_interrupted:
            tick += 5
            audit_id = submit(**request)
            claim = workplace.claim_stage(audit_id, Stage.VERIFY)
            with interrupted(monkeypatch, tick=tick):
                was_interrupted = not workplace.execute(claim)
            torch.manual_seed(tick)  # the next worker is another process
            audit = workplace.succeed(audit_id)
            assert self.outcome(workplace, audit_id) == expected, f"interrupted at tick {tick}"
            assert audit.summary["verification"] == quiet.summary["verification"]
            assert results(audit) == results(quiet)
        assert tick > 2 * 8, "in the middle of every epoch, and in the answers"

    def test_cancelled_it_stops_within_a_batch(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        place = workplace.with_settings(heartbeat_seconds=0.01)
        audit_id = submit(verify=self.VERIFY, fine_tune=FINE_TUNE | {"epochs": 8})
        claim = place.claim_stage(audit_id, Stage.VERIFY)
        assert place.audit(audit_id).state == "verifying"
        with transaction(place.engine) as session:
            work.request_cancel(session, session.get_one(Audit, audit_id))
        assert place.execute(claim) == []
        audit = place.audit(audit_id)
        assert (audit.state, audit.summary.keys() & {"verification"}) == ("cancelled", set())
        assert not place.artifacts(audit_id).outcome(0).exists()

    def test_a_training_that_is_done_is_not_done_again(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A worker that dies between the file and the commit leaves the file to the next."""
        audit_id = submit(verify=self.VERIFY)
        claim = workplace.claim_stage(audit_id, Stage.VERIFY)
        with monkeypatch.context() as patch:
            patch.setattr(work, "complete", died)
            workplace.execute(claim)
        before = self.outcome(workplace, audit_id)
        monkeypatch.setattr("workers.pipeline.verify.train", died)
        audit = workplace.succeed(audit_id)
        assert self.outcome(workplace, audit_id) == before
        assert arms_of(audit)["relabelled"]["metrics"]["accuracy"]["mean"] is not None


def died(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the worker died here")


class TestWhatIsSaidOfOddArms:
    def table(self, workplace: Workplace, labels: list[str], noise: list[bool]) -> dict[str, Any]:
        texts = [f"{word} film" for word in (*tiny.GOOD, *tiny.BAD)][: len(labels)]
        columns = {"text": "text", "label": "label", "noise": "noise"}
        table = {"text": texts, "label": labels, "noise": noise}
        return workplace.table("odd", table) | {"columns": columns}

    def warnings(self, audit: Audit) -> str:
        return "\n".join(audit.summary["verification"]["warnings"])

    def test_an_arm_without_samples_has_no_measures(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        train = self.table(workplace, ["pos", "neg"] * 4, [True] * 8)
        audit = workplace.succeed(
            submit(train=train, plant_noise=None, verify={"arms": ["full", "oracle"]})
        )
        oracle = arms_of(audit)["oracle"]
        assert (oracle["num_train"], oracle["num_removed"]) == (0, 8)
        assert oracle["metrics"]["accuracy"] == {"mean": None, "values": [None, None, None]}
        assert oracle["against_full"]["accuracy"] is None
        assert "The arm oracle leaves no sample to train on" in self.warnings(audit)

    def test_an_audit_of_nothing_but_such_arms_ends_all_the_same(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        train = self.table(workplace, ["pos", "neg"] * 4, [True] * 8)
        audit = workplace.succeed(
            submit(train=train, plant_noise=None, verify={"arms": ["oracle"]})
        )
        assert audit.provenance["num_trainings"] == 0
        assert arms_of(audit)["oracle"]["against_full"] is None

    def test_a_class_that_is_lost_is_named(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        noise = [label == "neg" for label in ["pos", "neg"] * 4]
        train = self.table(workplace, ["pos", "neg"] * 4, noise)
        audit = workplace.succeed(
            submit(train=train, plant_noise=None, verify={"arms": ["full", "oracle"], "seeds": [0]})
        )
        said = self.warnings(audit)
        assert "The arm oracle trains on no sample of the class 'neg'. One class is left" in said
        assert "One seed gives no interval" in said
        against = arms_of(audit)["oracle"]["against_full"]["accuracy"]
        assert (against["low"], against["num_seeds"]) == (None, 1)
        assert against["sample_low"] is not None

    def test_test_samples_that_took_part_are_counted(
        self, workplace: Workplace, submit: Callable[..., str]
    ) -> None:
        test = {
            "text": [*TRAIN["text"][:3], *TEST["text"]],
            "label": [*TRAIN["label"][:3], *TEST["label"]],
        }
        audit = workplace.succeed(
            submit(
                test=workplace.table("leaking", test),
                fine_tune=FINE_TUNE | {"epochs": 1},
                verify={"arms": ["full"]},
            )
        )
        assert "3 of the 28 test samples stand in the training set too" in self.warnings(audit)

    def test_a_training_that_diverges_ends_no_audit(
        self,
        workplace: Workplace,
        submit: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def diverging(context: Any, runner: Any, training: Any) -> Any:
            if training.options.seed == 1 and len(training.index_N) < 60:
                raise Diverged(7)
            return train(context, runner, training)

        monkeypatch.setattr("workers.pipeline.verify.train", diverging)
        audit = workplace.succeed(
            submit(
                fine_tune=FINE_TUNE | {"epochs": 1},
                verify={"arms": ["full", "filtered"], "seeds": [0, 1, 2]},
            )
        )
        arms = arms_of(audit)
        accuracy = arms["filtered"]["metrics"]["accuracy"]
        assert [value is None for value in accuracy["values"]] == [False, True, False]
        assert accuracy["mean"] == pytest.approx(
            (accuracy["values"][0] + accuracy["values"][2]) / 2
        )
        assert arms["filtered"]["against_full"]["accuracy"]["num_seeds"] == 2
        assert "The arm filtered diverged with seed 1, which has no" in self.warnings(audit)


@pytest.mark.parametrize(
    ("test", "field", "sentence"),
    [
        ({"text": ["a film"], "label": ["maybe"]}, "test.columns.label", "has labels that the"),
        ({"text": ["a film"], "label": [1]}, "test.columns.label", "both have text labels"),
        ({"text": ["a film"]}, "test.columns.label", "label"),
        ({"text": [], "label": []}, "test", "no rows"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_by_name(
    workplace: Workplace,
    submit: Callable[..., str],
    test: dict[str, Any],
    field: str,
    sentence: str,
) -> None:
    audit = workplace.finish(submit(test=workplace.table("unfit", test)))
    assert (audit.state, audit.error_field) == ("failed", field)
    assert sentence in (audit.error_message or "")


def test_layers_that_the_model_has_not_are_refused_before_the_work(
    workplace: Workplace, submit: Callable[..., str]
) -> None:
    rankings = [{"layers": "00"}, {"layers": "07"}]
    audit = workplace.finish(submit(verify={"rankings": rankings}))
    assert (audit.error_code, audit.error_field) == (
        "unknown_layers",
        "verify.rankings.1.layers",
    )
    assert audit.timings.keys() == {"prepare", "fine_tune"}
