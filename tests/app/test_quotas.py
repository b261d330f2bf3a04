"""How much a tenant may use: what is too much answers 429 and stores nothing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.datasets.models import Dataset
from app.db import transaction
from app.keys.service import create_key
from app.limits.models import WorkerUsage
from app.limits.quotas import list_limits, set_limits
from app.main import create_app
from app.settings import Settings
from app.work import repository as work
from app.work.models import WorkUnit
from tests.factories import CSV_TABLE, experiment_body, make_audit, request_body

ROWS = CSV_TABLE.count("\n") - 1


@pytest.fixture
def limited(settings: Settings, engine: Engine, celery: Celery) -> Callable[..., TestClient]:
    """Makes clients of a tenant on a server with limits."""

    def make(*, tenant: str = "default", **limits: int) -> TestClient:
        key = create_key(engine, tenant=tenant, name="test", valid_days=1)
        api = create_app(settings.model_copy(update=limits), engine, celery)
        return TestClient(api, headers={"Authorization": f"Bearer {key.secret}"})

    return make


def count(engine: Engine, table: type[Any]) -> int:
    with Session(engine) as session:
        return session.scalars(select(func.count()).select_from(table)).one()


def upload(client: TestClient, **options: Any) -> Any:
    return client.post("/v1/datasets", files={"file": ("a.csv", CSV_TABLE)}, **options)


class TestAuditsAtOnce:
    def test_one_too_many_waits_for_the_end_of_another(
        self, limited: Callable[..., TestClient], engine: Engine
    ) -> None:
        client = limited(max_open_audits=2)
        first = [client.post("/v1/audits", json=request_body()).json()["id"] for _ in range(2)]
        refused = client.post("/v1/audits", json=request_body())
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "5"
        problem = refused.json()
        assert problem["type"] == "urn:winnow:problem:quota-exceeded"
        assert (problem["quota"], problem["limit"], problem["used"]) == ("max_open_audits", 2, 2)
        assert "WINNOW_MAX_OPEN_AUDITS" in problem["detail"]
        assert count(engine, Audit) == 2
        client.post(f"/v1/audits/{first[0]}/cancel")
        assert client.post("/v1/audits", json=request_body()).status_code == 202

    def test_the_pause_is_how_long_the_next_one_takes(
        self, limited: Callable[..., TestClient], engine: Engine
    ) -> None:
        client = limited(max_open_audits=1)
        make_audit(engine)
        for left, pause in ((42.2, "43"), (9000.0, "600")):
            with transaction(engine) as session:
                session.execute(update(Audit).values(eta_seconds=left))
            refused = client.post("/v1/audits", json=request_body())
            assert refused.headers["Retry-After"] == pause

    def test_all_audits_of_an_experiment_count(self, limited: Callable[..., TestClient]) -> None:
        assert (
            limited(max_open_audits=1)
            .post("/v1/experiments", json=experiment_body())
            .json()["used"]
            == 0
        )
        client = limited(max_open_audits=2)
        assert client.post("/v1/experiments", json=experiment_body()).status_code == 202
        assert client.post("/v1/experiments", json=experiment_body()).status_code == 429

    def test_a_repeated_call_gets_its_answer_all_the_same(
        self, limited: Callable[..., TestClient]
    ) -> None:
        client = limited(max_open_audits=1)
        header = {"Idempotency-Key": "once"}
        answers = [client.post("/v1/audits", json=request_body(), headers=header) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 202]

    def test_calls_at_once_do_not_slip_through_together(
        self, limited: Callable[..., TestClient], engine: Engine
    ) -> None:
        client = limited(max_open_audits=3)
        with ThreadPoolExecutor(8) as pool:
            codes = list(
                pool.map(
                    lambda _: client.post("/v1/audits", json=request_body()).status_code, range(8)
                )
            )
        assert sorted(codes) == [202] * 3 + [429] * 5

    def test_another_tenants_audits_do_not_count(
        self, limited: Callable[..., TestClient], engine: Engine
    ) -> None:
        make_audit(engine, tenant="others")
        client = limited(max_open_audits=1)
        assert client.post("/v1/audits", json=request_body()).status_code == 202


class TestRoomForDatasets:
    @pytest.mark.parametrize(
        ("name", "limit"),
        [("max_dataset_rows", 2 * ROWS), ("max_dataset_bytes", 2 * len(CSV_TABLE))],
    )
    def test_what_is_deleted_makes_room(
        self,
        limited: Callable[..., TestClient],
        engine: Engine,
        settings: Settings,
        name: str,
        limit: int,
    ) -> None:
        client = limited(**{name: limit})
        first = [upload(client).json()["id"] for _ in range(2)]
        refused = upload(client)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "3600"
        assert (refused.json()["quota"], refused.json()["used"]) == (name, limit)
        assert count(engine, Dataset) == 2
        assert len(list((settings.data_dir / "datasets").iterdir())) == 2
        assert client.delete(f"/v1/datasets/{first[0]}").status_code == 204
        assert upload(client).status_code == 201


class TestWorkersTime:
    def used(self, engine: Engine, minutes: float, *, tenant: str = "default") -> None:
        now = datetime.now(UTC)
        with transaction(engine) as session:
            row = {"tenant": tenant, "day": now.date(), "served_at": now}
            session.merge(WorkerUsage(**row, seconds=60 * minutes))

    def test_when_it_is_used_up_the_next_day_is_told(
        self, limited: Callable[..., TestClient], engine: Engine
    ) -> None:
        client = limited(worker_minutes_per_day=10)
        self.used(engine, 9.9)
        assert client.post("/v1/audits", json=request_body()).status_code == 202
        self.used(engine, 10.1)
        refused = client.post("/v1/audits", json=request_body())
        assert refused.status_code == 429
        midnight = datetime.now(UTC) + timedelta(seconds=int(refused.headers["Retry-After"]))
        assert abs((midnight - midnight.replace(hour=0, minute=0, second=0)).seconds) < 30
        assert client.post("/v1/experiments", json=experiment_body()).status_code == 429

    def test_it_is_counted_from_claim_to_end_and_survives_the_audit(self, engine: Engine) -> None:
        audit = make_audit(engine)
        with Session(engine) as session:
            unit_id = session.scalars(select(WorkUnit.id)).one()

        def pass_time(seconds: float) -> None:
            with transaction(engine) as session:
                earlier = WorkUnit.charged_until - timedelta(seconds=seconds)
                session.execute(update(WorkUnit).values(charged_until=earlier))

        def seconds() -> float:
            with Session(engine) as session:
                return session.scalars(select(WorkerUsage.seconds)).one()

        held = work.claim(engine, unit_id, owner="w", lease_seconds=60)
        assert held is not None
        assert seconds() == 0
        pass_time(20)
        work.renew(engine, held, lease_seconds=60, done=1, total=2)
        assert 20 <= seconds() < 25
        pass_time(30)
        work.release(engine, held, reason="stopped", count_attempt=False)
        assert 50 <= seconds() < 55
        pass_time(1000)  # nobody is at it
        held = work.claim(engine, unit_id, owner="w", lease_seconds=60)
        assert held is not None
        with transaction(engine) as session:
            work.complete(session, held, result={})
        assert 50 <= seconds() < 56
        with transaction(engine) as session:
            session.delete(session.get_one(Audit, audit.id))
        assert 50 <= seconds() < 56


class TestLimitsOfOneTenant:
    def test_they_stand_in_place_of_the_settings(
        self, limited: Callable[..., TestClient], engine: Engine
    ) -> None:
        set_limits(engine, "small", {"max_open_audits": 1})
        set_limits(engine, "large", {"max_open_audits": 0})
        codes = {}
        for tenant in ("small", "large", "usual"):
            client = limited(tenant=tenant, max_open_audits=2)
            codes[tenant] = [
                client.post("/v1/audits", json=request_body()).status_code for _ in range(3)
            ]
        assert codes == {
            "small": [202, 429, 429],
            "large": [202, 202, 202],
            "usual": [202, 202, 429],
        }

    def test_one_is_changed_without_the_others(self, engine: Engine) -> None:
        set_limits(engine, "one", {"max_open_audits": 1, "max_dataset_rows": 5})
        set_limits(engine, "one", {"max_open_audits": None})
        (row,) = list_limits(engine)
        assert (row.max_open_audits, row.max_dataset_rows) == (None, 5)
