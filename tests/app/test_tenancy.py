"""Another tenant's things do not exist, and without a key nothing does."""

import httpx2
import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.audits.models import Audit
from app.datasets.models import Dataset
from app.db import new_id, transaction
from app.keys.service import create_key, revoke_key
from app.main import create_app
from app.settings import Settings

OPEN_PATHS = {"/healthz", "/readyz"}


@pytest.fixture
def strict_settings(settings: Settings) -> Settings:
    """As on any address but loopback: every caller needs a key."""
    return settings.model_copy(update={"require_keys": True})


@pytest.fixture
def owned(engine: Engine) -> dict[str, str]:
    """An audit and a dataset of the tenant `owner`."""
    audit = Audit(
        id=new_id("aud"),
        tenant="owner",
        request={
            "estimators": ["grad_dot"],
            "ranking": {"estimator": "grad_dot"},
            "model": {"reference": "file:///m"},
            "train": {"reference": "upload:ds_1"},
            "validation": {"reference": "upload:ds_2"},
        },
    )
    dataset = Dataset(
        id=new_id("ds"),
        tenant="owner",
        name="train.csv",
        format="csv",
        columns={},
        num_rows=1,
        num_bytes=1,
        sha256="0",
        summary={},
    )
    with transaction(engine) as session:
        session.add_all([audit, dataset])
    return {"audit_id": audit.id, "dataset_id": dataset.id, "index": "0", "file_format": "csv"}


def walk(
    settings: Settings, engine: Engine, celery: Celery, owned: dict[str, str], key: str | None
) -> dict[str, httpx2.Response]:
    """Call every documented route of the app with the owner's ids."""
    app = create_app(settings, engine=engine, celery=celery)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answers = {}
    with TestClient(app, base_url="http://127.0.0.1", headers=headers) as client:
        for path, methods in app.openapi()["paths"].items():
            for method in methods:
                url = path.format_map(_Ids(owned))
                answers[f"{method.upper()} {path}"] = client.request(method, url)
    assert len(answers) >= 15
    return answers


class _Ids(dict[str, str]):
    """Path parameters by name; a format's name fits any that is not an id."""

    def __missing__(self, name: str) -> str:
        return "csv"


def test_a_stranger_finds_nothing_on_any_route(
    strict_settings: Settings, engine: Engine, celery: Celery, owned: dict[str, str]
) -> None:
    """Every route that names an id answers 404 to another tenant; lists are empty."""
    key = create_key(engine, tenant="stranger", name="test", valid_days=1).secret
    answers = walk(strict_settings, engine, celery, owned, key)
    for call, answer in answers.items():
        if "_id}" in call:
            assert answer.status_code == 404, (call, answer.text)
        elif call in {"GET /v1/audits", "GET /v1/datasets"}:
            assert answer.json()["data"] == [], call


def test_without_a_key_nobody_gets_past_the_door(
    strict_settings: Settings, engine: Engine, celery: Celery, owned: dict[str, str]
) -> None:
    """No key, an unknown one and a revoked one are all turned away, on every route."""
    revoked = create_key(engine, tenant="owner", name="old", valid_days=1)
    revoke_key(engine, revoked.id)
    for key in (None, "wnw_unknown", revoked.secret):
        for call, answer in walk(strict_settings, engine, celery, owned, key).items():
            if call.split()[1] not in OPEN_PATHS:
                assert answer.status_code == 401, (call, answer.text)
