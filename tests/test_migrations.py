"""Migrations: up, down and up again, and what they make is what the models say."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Connection, Engine, inspect, select, text
from sqlalchemy.orm import Session

import app.tables  # noqa: F401  registers every table
from app.audits.assemble import assemble_audit
from app.audits.models import Audit, AuditState, IdempotencyKey, Ranking
from app.audits.schemas import AuditRequest
from app.db import Base, make_engine
from app.embedded import EmbeddedServers
from app.migrate import migrate
from app.settings import Settings
from app.work.models import Stage, WorkUnit
from app.work.repository import add_ranking_unit
from app.work.stages import overall_progress, stages_of


@pytest.fixture
def empty(servers: EmbeddedServers) -> Iterator[Engine]:
    """A database of this test's own, without tables."""
    url = Settings(database_url=servers.database_url).require_database_url()
    outside = make_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with outside.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS migrated"))
        connection.execute(text("CREATE DATABASE migrated"))
    engine = make_engine(url.replace("/postgres?", "/migrated?"))
    yield engine
    engine.dispose()
    outside.dispose()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) - {"alembic_version"}


def take_back(engine: Engine, revision: str) -> None:
    """Downgrade step by step to a revision."""
    current = None
    while current != revision:
        migrate(engine, "-1")
        with engine.connect() as connection:
            current = connection.scalar(text("SELECT version_num FROM alembic_version"))


def test_up_down_and_up_again(empty: Engine) -> None:
    migrate(empty)
    assert tables(empty) == set(Base.metadata.tables)
    migrate(empty, "base")
    assert tables(empty) == set()
    migrate(empty)
    migrate(empty)  # nothing is left to do
    assert tables(empty) == set(Base.metadata.tables)


def test_samples_without_labels_outlive_a_way_back(empty: Engine) -> None:
    """The version before knows no such samples; what it cannot hold becomes empty, not lost."""
    migrate(empty)
    row = (
        "INSERT INTO training_samples "
        "VALUES ('a', 0, 'text', NULL, NULL, NULL, 1, 1, 0, NULL, true)"
    )
    with empty.begin() as connection:
        connection.execute(text("SET session_replication_role = replica"))  # no audit is needed
        connection.execute(text(row))
    take_back(empty, "0001")
    with empty.connect() as connection:
        labels = "SELECT given_label, predicted_label FROM training_samples"
        assert connection.execute(text(labels)).all() == [("", "")]
    migrate(empty)
    with empty.connect() as connection:
        kept = connection.execute(text("SELECT text, non_finite FROM training_samples")).all()
    assert kept == [("text", False)]


def test_a_way_back_ends_the_audits_that_verify(empty: Engine) -> None:
    """The version before knows neither the state nor the units; ended ones stay readable."""
    migrate(empty)
    times = json.dumps({"verifying": "2026-01-01T00:00:00+00:00"})
    insert = text(
        "INSERT INTO audits (id, tenant, state, version, request, metadata, state_times, stage, "
        "progress, provenance, summary, timings, finished_at) VALUES (:id, 'default', :state, 7, "
        "'{}', '{}', :times, :stage, 0.5, '{}', '{}', '{}', :finished_at)"
    )
    with empty.begin() as connection:
        for id_, state, stage, finished_at in (
            ("running", "verifying", "verify", None),
            ("ended", "succeeded", None, "2026-01-02T00:00:00Z"),
        ):
            row = {"id": id_, "state": state, "stage": stage, "finished_at": finished_at}
            connection.execute(insert, row | {"times": times})
            connection.execute(
                text(
                    "INSERT INTO work_units (id, audit_id, stage, position, state, epoch, "
                    "attempts, done, total, result) VALUES (:id, :id, 'verify', 0, :state, 1, 1, "
                    "0, 1, '{}')"
                ),
                {"id": id_, "state": "done" if finished_at else "ready"},
            )
    take_back(empty, "0002")
    with empty.connect() as connection:
        rows = connection.execute(
            text("SELECT id, state, stage, error_code, state_times FROM audits ORDER BY id")
        ).all()
        units = connection.execute(text("SELECT id FROM work_units")).scalars().all()
    assert [tuple(row)[:4] for row in rows] == [
        ("ended", "succeeded", None, None),
        ("running", "failed", None, "upgraded"),
    ]
    assert [list(row[4]) for row in rows] == [[], ["failed"]]
    assert units == ["ended"]
    migrate(empty)


class TestAuditsOfTheFirstVersion:
    """What becomes of rows that 0.1.0 wrote."""

    REQUEST: ClassVar[dict[str, Any]] = {
        "model": {
            "reference": "hf://org/model@main",
            "adapter": None,
            "target_modules": None,
        },
        "train": {
            "reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f",
            "columns": {"text": "text", "label": "label", "text_pair": None, "noise": None},
        },
        "validation": {
            "reference": "upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e10",
            "columns": {"text": "t", "label": "l", "text_pair": None, "noise": "wrong"},
        },
        "fine_tune": None,
        "plant_noise": {"fraction": 0.2, "seed": 0},
        "estimators": ["grad_dot", "datainf", "self_influence", "oracle"],
        "ranking": {
            "estimator": "datainf",
            "layers": "02-03",
            "aggregation": "vote",
            "vote_fraction": 0.3,
            "correct_only": True,
        },
        "flag": {"fraction": 0.1, "count": None},
        "max_tokens": 256,
        "precision": "bfloat16",
        "seed": 0,
    }
    # id, state, stage, whether it has ended, whether its end was asked for
    AUDITS = (
        ("queued", "queued", None, False, False),
        ("hub", "queued", None, False, False),
        ("preparing", "preparing", "prepare", False, False),
        ("curving", "computing", "precondition", False, False),
        ("stopping", "computing", "gradients", False, True),
        ("ended", "succeeded", None, True, False),
        ("odd", "cancelled", "precondition", True, True),
    )

    @pytest.fixture
    def upgraded(self, empty: Engine) -> Engine:
        migrate(empty, "0001")
        with empty.begin() as connection:
            for row in self.AUDITS:
                self._insert(connection, *row)
        migrate(empty)
        return empty

    def request_of(self, id_: str) -> dict[str, Any]:
        """Return a request; one names data sets on the hub, whose columns it does not know."""
        if id_ != "hub":
            return self.REQUEST
        source = {"reference": "hf://datasets/org/texts@main?split=test", "columns": None}
        return {**self.REQUEST, "train": source, "validation": source}

    def _insert(self, connection: Connection, id_: str, state: str, *rest: Any) -> None:
        stage, is_over, is_cancelled = rest
        audit = {
            "id": id_,
            "state": state,
            "stage": stage,
            "request": json.dumps(self.request_of(id_)),
            "times": json.dumps({state: "2026-01-01T00:00:00+00:00"}),
            "finished_at": "2026-01-02T00:00:00Z" if is_over else None,
            "cancelled_at": "2026-01-02T00:00:00Z" if is_cancelled else None,
        }
        connection.execute(
            text(
                "INSERT INTO audits VALUES (:id, 'default', :state, 7, :request, '{}', now(), "
                ":finished_at, :times, :cancelled_at, :stage, 0.5, 10, 60, NULL, NULL, '{}', "
                "'{}', '{}', NULL, NULL, NULL)"
            ),
            audit,
        )
        open_state, lease = ("ready", None) if state == "queued" else ("running", "now")
        for position, (unit_state, lease_until) in enumerate(
            [("done", None), (open_state, lease)][: 1 if is_over else 2]
        ):
            connection.execute(
                text(
                    "INSERT INTO work_units (id, audit_id, stage, position, state, epoch, "
                    "attempts, lease_until, done, total, result) VALUES (:id, :audit, :stage, "
                    ":position, :state, 1, 1, :lease, 0, 1, '{}')"
                ),
                {
                    "id": f"{id_}-{position}",
                    "audit": id_,
                    "stage": stage or "prepare",
                    "position": position,
                    "state": unit_state,
                    "lease": lease_until,
                },
            )

    def test_what_had_begun_has_failed_and_says_why(self, upgraded: Engine) -> None:
        with Session(upgraded) as session:
            for audit_id in ("preparing", "curving"):
                audit = session.get_one(Audit, audit_id)
                assert (audit.state, audit.stage, audit.eta_seconds) == ("failed", None, None)
                assert (audit.error_code, audit.error_field) == ("upgraded", None)
                assert "submit it again" in (audit.error_message or "")
                assert audit.finished_at is not None
                assert audit.version == 8
                answer = assemble_audit(audit, influence_days=30)
                assert list(answer.state_times)[-1] == "failed"
                assert answer.state_times[AuditState.FAILED] == audit.finished_at
            stopped = session.get_one(Audit, "stopping")
            assert (stopped.state, stopped.error_code) == ("cancelled", None)
            assert assemble_audit(stopped, influence_days=30).done

    def test_none_of_their_work_is_left(self, upgraded: Engine) -> None:
        with Session(upgraded) as session:
            units = session.scalars(select(WorkUnit)).all()
            assert {unit.id for unit in units if unit.state != "done"} == {*("queued-1", "hub-1")}
            assert {unit.id for unit in units if unit.state == "done"} == {
                f"{audit_id}-0" for audit_id, *_ in self.AUDITS
            }

    def test_queued_ones_go_on(self, upgraded: Engine) -> None:
        """Their requests lack what is new; it has a default."""
        with Session(upgraded) as session:
            assert AuditRequest.model_validate(session.get_one(Audit, "hub").request).validation
            audit = session.get_one(Audit, "queued")
            assert (audit.state, audit.version, audit.finished_at) == ("queued", 7, None)
            request = AuditRequest.model_validate(audit.request)
            assert (request.task, request.model.checkpoints) == ("classification", None)
            assert request.ranking.layers == "02-03"
            assert request.validation is not None
            assert request.validation.columns is not None
            assert (request.validation.columns.text, request.validation.columns.noise) == (
                *("t", None),
            )
            assert Stage.CURVATURE in stages_of(audit.request)
            assert overall_progress(audit.request, Stage.AGGREGATE, 1.0) == 1.0

    def test_what_had_ended_stays_as_it_was(self, upgraded: Engine) -> None:
        with Session(upgraded) as session:
            ended, odd = (session.get_one(Audit, name) for name in ("ended", "odd"))
            assert (ended.state, ended.version, ended.stage) == ("succeeded", 7, None)
            assert (odd.state, odd.stage) == ("cancelled", "curvature")
            assert assemble_audit(odd, influence_days=30).stage is Stage.CURVATURE


def test_rankings_of_older_audits_are_their_own_and_have_ended(empty: Engine) -> None:
    """They take over what the audit's summary says of the ranking; a way back drops later ones."""
    of_ranking = {"num_flagged": 2, "files": {"csv": {"bytes": 1}}, "group_order": ["all"]}
    summary = json.dumps({**of_ranking, "train_accuracy": 0.5})
    migrate(empty, "0002")
    with empty.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO audits (id, tenant, state, version, request, metadata, state_times, "
                "progress, provenance, summary, timings, finished_at) VALUES ('a', 't', "
                "'succeeded', 1, :request, '{}', '{}', 1, '{}', :summary, '{}', '2026-01-02Z')"
            ),
            {"request": json.dumps({"flag": {"fraction": 0.1}}), "summary": summary},
        )
        connection.execute(
            text("INSERT INTO rankings VALUES ('r', 'a', 't', :specification)"),
            {"specification": json.dumps({"layers": "CL"})},
        )
        connection.execute(
            text("INSERT INTO idempotency_keys VALUES ('t', 'POST /v1/audits', 'k', '', 'a')")
        )
    migrate(empty)
    with Session(empty) as session:
        own = session.get_one(Ranking, "r")
        assert (own.is_own, own.state, own.progress, own.folder) == (
            *(True, "succeeded", 1.0, "results"),
        )
        assert (own.specification, own.flag) == ({"layers": "CL"}, {"fraction": 0.1})
        assert own.summary == of_ranking
        audit = session.get_one(Audit, "a")
        assert own.finished_at == audit.finished_at
        assert (audit.influence_bytes, audit.influence_deleted_at) == (None, None)
        key = session.scalars(select(IdempotencyKey)).one()
        assert key.answer_id == "a"
        later = Ranking(
            id="s", audit_id="a", tenant="t", specification={}, flag={}, folder="results/s"
        )
        session.add(later)
        session.flush()
        add_ranking_unit(session, later)
        session.commit()
    take_back(empty, "0002")
    with empty.connect() as connection:
        assert connection.execute(text("SELECT id FROM rankings")).all() == [("r",)]
        assert connection.execute(text("SELECT id FROM work_units")).all() == []
    migrate(empty)


def test_the_migrations_make_what_the_models_say(empty: Engine) -> None:
    migrate(empty)
    options = {"compare_type": True, "compare_server_default": True}
    with empty.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_checks_and_partial_indexes_are_those_of_the_models(empty: Engine) -> None:
    """What Alembic's comparison does not look at."""
    migrate(empty)
    inspector = inspect(empty)
    for table in Base.metadata.sorted_tables:
        made = {str(check["name"]) for check in inspector.get_check_constraints(table.name)}
        meant = {
            str(constraint.name)
            for constraint in table.constraints
            if isinstance(constraint, CheckConstraint)
        }
        assert made == meant, table.name
        partial = {
            str(index["name"])
            for index in inspector.get_indexes(table.name)
            if index.get("dialect_options", {}).get("postgresql_where")
        }
        assert partial == {
            str(index.name)
            for index in table.indexes
            if index.dialect_options["postgresql"]["where"] is not None
        }, table.name
