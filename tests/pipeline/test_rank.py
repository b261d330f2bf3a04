"""A ranking that is asked when the audit has ended: the same bits as one that was asked at once."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete

from app.audits.models import Audit, RankedSample, Ranking
from app.db import transaction
from app.work.models import Stage, UnitState
from tests.factories import make_ranking
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace
from workers import tasks
from workers.pipeline import publish, run
from workers.pipeline.prepared import Prepared

EPOCHS: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 16}
ESTIMATORS = ["grad_dot", "datainf", "tracin", "repsim", "outlier_gradient", "tracin_we"]
FLAG = {"fraction": None, "count": 1}
RANKINGS: list[dict[str, Any]] = [
    {"estimator": "grad_dot", "aggregation": "mean", "layers": "CL"},
    {"estimator": "datainf", "aggregation": "rank", "correct_only": True},
    {"estimator": "datainf", "aggregation": "vote", "vote_fraction": 0.2, "layers": "01"},
    {"estimator": "tracin", "aggregation": "trimmed_mean", "trim_fraction": 0.2},
    {"estimator": "repsim", "aggregation": "median", "correct_only": True},
    {"estimator": "outlier_gradient", "aggregation": "min", "layers": "00-01"},
    {"estimator": "tracin_we", "aggregation": "common_set", "layers": "WE"},
    {"estimator": "grad_dot", "aggregation": "common_set", "common_share": 0.3},
    {"estimator": "grad_dot", "aggregation": "median", "layers": "01,CL", "correct_only": True},
    {"estimator": "self_influence", "aggregation": "rank", "layers": "00"},
    {"estimator": "loss"},
    {"estimator": "random"},
    {"estimator": "oracle"},
]


def ask(place: Workplace, audit: Audit, **specification: Any) -> Ranking:
    """Ask for a ranking, and work until it has ended."""
    ranking = make_ranking(place.engine, audit, **{"layers": "all", **specification})
    place.finish(audit.id)
    with transaction(place.engine) as session:
        return session.get_one(Ranking, ranking.id)


def rows_of(place: Workplace, ranking_id: str) -> list[tuple[Any, ...]]:
    names = [column.key for column in RankedSample.__table__.columns if column.key != "ranking_id"]
    with transaction(place.engine) as session:
        rows = session.query(RankedSample).filter_by(ranking_id=ranking_id)
        return [tuple(getattr(row, name) for name in names) for row in rows.order_by("rank")]


def own(place: Workplace, audit: Audit) -> Ranking:
    with transaction(place.engine) as session:
        return session.get_one(Ranking, audit.summary["ranking_id"])


@pytest.fixture
def submit(workplace: Workplace, models: Models) -> Callable[..., Audit]:
    """Run an audit of several shards that computes every kind of estimator."""
    data = workplace.reviews(num_train=90)

    def submit(**ranking: Any) -> Audit:
        return workplace.succeed(
            workplace.submit(
                models.encoder,
                **data,
                fine_tune=EPOCHS,
                plant_noise={"fraction": 0.2},
                estimators=ESTIMATORS,
                aggregations=[],
                ranking=ranking,
                flag=FLAG,
            )
        )

    return submit


def test_it_is_the_same_to_the_bit_as_an_audit_with_that_ranking(
    submit: Callable[..., Audit], workplace: Workplace
) -> None:
    """Rows, files, detection and layers, for every aggregation and kind of estimator."""
    audit = submit(estimator="grad_dot", aggregation="mean")
    assert audit.provenance["num_shards"] > 3
    for specification in RANKINGS:
        later = ask(workplace, audit, **{"aggregation": "rank", **specification})
        assert later.state == "succeeded", (specification, later.error_message)
        twin = own(workplace, submit(**{"aggregation": "rank", **specification}))
        assert rows_of(workplace, later.id) == rows_of(workplace, twin.id), specification
        for name in ("files", "detection", "num_flagged", "group_order"):
            assert later.summary[name] == twin.summary[name], (specification, name)
        theirs = twin.summary["configurations"]
        assert later.summary["configurations"]
        assert all(item in theirs for item in later.summary["configurations"])
        groups = later.summary["layer_groups"]
        assert {name: twin.summary["layer_groups"][name] for name in groups} == groups
    assert not list(workplace.artifacts(audit.id).root.glob("scratch/*/*"))


class TestBesideItsAudit:
    @pytest.fixture
    def audit(self, workplace: Workplace, models: Models) -> Audit:
        return workplace.succeed(
            workplace.submit(models.classifier, **workplace.reviews(), estimators=["grad_dot"])
        )

    def test_the_audit_stays_as_it_was(self, workplace: Workplace, audit: Audit) -> None:
        before = own(workplace, audit)
        rows = rows_of(workplace, before.id)
        later = ask(workplace, audit, estimator="grad_dot", layers="CL")
        assert later.finished_at is not None
        assert later.seconds is not None
        assert (later.progress, later.summary["num_flagged"]) == (1.0, 1)
        after = workplace.audit(audit.id)
        for name in ("state", "version", "summary", "timings", "finished_at", "progress"):
            assert getattr(after, name) == getattr(audit, name), name
        assert rows_of(workplace, before.id) == rows

    def test_what_is_kept_is_measured_when_the_audit_ends(
        self, workplace: Workplace, audit: Audit
    ) -> None:
        root = workplace.artifacts(audit.id).root
        kept = ("influence", "facts", "validation", "prepared")
        files = [path for name in kept for path in (root / name).rglob("*") if path.is_file()]
        assert audit.influence_bytes == sum(path.stat().st_size for path in files) > 0

    def test_layers_that_the_model_does_not_have(self, workplace: Workplace, audit: Audit) -> None:
        later = ask(workplace, audit, estimator="grad_dot", layers="08-15")
        assert (later.state, later.error_code, later.error_field) == (
            *("failed", "unknown_layers", "layers"),
        )
        assert "there is no block 15" in (later.error_message or "")
        assert workplace.audit(audit.id).state == "succeeded"

    def test_files_that_are_gone_fail_the_ranking_at_once(
        self, workplace: Workplace, audit: Audit
    ) -> None:
        shutil.rmtree(workplace.artifacts(audit.id).root / "influence")
        later = ask(workplace, audit, estimator="grad_dot")
        assert (later.state, later.error_code) == ("failed", "influence_missing")
        (unit,) = [unit for unit in workplace.units(audit.id) if unit.ranking_id]
        assert unit.attempts == 1

    def test_a_poison_ranking_fails_alone(
        self, workplace: Workplace, audit: Audit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def poisoned(_context: object) -> None:
            raise RuntimeError("something that nobody thought of")

        monkeypatch.setitem(run.STAGES, Stage.RANK, poisoned)
        later = ask(workplace, audit, estimator="grad_dot")
        assert (later.state, later.error_code) == ("failed", "internal_error")
        assert "Stage rank, part 0, failed 3 times" in (later.error_message or "")
        assert workplace.audit(audit.id).state == "succeeded"

    def test_a_crash_after_the_files_is_done_again_to_the_same_files(
        self, workplace: Workplace, audit: Audit
    ) -> None:
        expected = ask(workplace, audit, estimator="grad_dot", layers="CL")
        again = make_ranking(workplace.engine, audit, estimator="grad_dot", layers="CL")
        claim = workplace.claim(audit.id)
        assert claim is not None
        folder = workplace.artifacts(audit.id).results(again.id)
        folder.mkdir(parents=True)
        (folder / "suspects.csv").write_text("what a dead worker left")
        workplace.execute(workplace.expire(claim))
        with transaction(workplace.engine) as session:
            assert session.get_one(Ranking, again.id).summary == expected.summary

    def test_a_deleted_ranking_stops_its_worker_and_leaves_nothing(
        self, workplace: Workplace, audit: Audit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Deleted after the files are written, before its rows are."""
        ranking = make_ranking(workplace.engine, audit, estimator="grad_dot")
        claim = workplace.claim(audit.id)
        assert claim is not None
        write_files = publish.write_files

        def write_then_delete(*arguments: Any) -> Any:
            written = write_files(*arguments)
            with transaction(workplace.engine) as session:
                session.execute(delete(Ranking).where(Ranking.id == ranking.id))
            return written

        monkeypatch.setattr("workers.pipeline.rank.write_files", write_then_delete)
        assert workplace.execute(claim) == []
        assert not workplace.artifacts(audit.id).results(ranking.id).exists()
        assert rows_of(workplace, ranking.id) == []
        assert workplace.audit(audit.id).state == "succeeded"

    def test_a_worker_leaves_no_folder_of_an_audit_that_is_gone_too(
        self, workplace: Workplace, audit: Audit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_ranking(workplace.engine, audit, estimator="grad_dot")
        claim = workplace.claim(audit.id)
        assert claim is not None
        write_files = publish.write_files

        def delete_then_write(*arguments: Any) -> Any:
            with transaction(workplace.engine) as session:
                session.execute(delete(Audit).where(Audit.id == audit.id))
            shutil.rmtree(workplace.artifacts(audit.id).root / "results")
            return write_files(*arguments)

        monkeypatch.setattr("workers.pipeline.rank.write_files", delete_then_write)
        assert workplace.execute(claim) == []
        assert not workplace.artifacts(audit.id).root.exists()

    def test_a_stopped_worker_gives_the_ranking_back(
        self, workplace: Workplace, audit: Audit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ranking = make_ranking(workplace.engine, audit, estimator="grad_dot")
        claim = workplace.claim(audit.id)
        assert claim is not None
        with monkeypatch.context() as patch:
            read = Prepared.read

            def read_and_drain(*arguments: Any) -> Any:
                tasks._held[0].drain()  # as the signal's handler does
                return read(*arguments)

            patch.setattr(Prepared, "read", read_and_drain)
            assert workplace.execute(claim) == []
        unit = workplace.unit(claim)
        assert (unit.state, unit.attempts) == (UnitState.READY, 0)
        workplace.finish(audit.id)
        with transaction(workplace.engine) as session:
            assert session.get_one(Ranking, ranking.id).state == "succeeded"
