"""Experiments over HTTP, in the words of the tests."""

from typing import Any

import httpx2
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.audits.models import Audit


def post(client: TestClient, body: dict[str, Any], key: str | None = None) -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/experiments", json=body, headers=headers)


def audits_of(engine: Engine, experiment_id: str) -> list[Audit]:
    statement = select(Audit).where(Audit.experiment_id == experiment_id)
    with Session(engine) as session:
        return list(session.scalars(statement.order_by(Audit.experiment_position)))


def number_of(engine: Engine, table: type[Any]) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(table)) or 0
