"""The dashboard and the alerts ask for what /metrics tells, by its names and labels."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from app.audits.models import AuditState
from app.db import transaction
from app.settings import Settings
from app.work.models import UnitState, WorkerHeartbeat, WorkUnit
from tests.docs.pages import ROOT, text_of
from tests.factories import long_ago, make_audit, make_ended_audit
from tests.metrics.test_metrics import client_of
from workers.pipeline.failures import INTERNAL_ERROR

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yml").read_text())
METRIC = re.compile(r"\b(?:winnow|process)_[a-z_]+\b")
LABELS = re.compile(r"\b((?:winnow|process)_[a-z_]+)\{([^}]*)\}")
BY = re.compile(r"\bby \(([a-z, ]+)\)")

Told = dict[str, set[str]]


def expressions() -> Iterator[str]:
    """Yield every query of the dashboard and of the alerts."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


@pytest.fixture
def told(settings: Settings, engine: Engine, celery: Celery) -> Told:
    """Every sample's name with its labels, of a service where everything has happened once."""
    make_ended_audit(engine, AuditState.FAILED)
    audit = make_audit(engine)
    gpu = {"gpu_memory_used": 1, "gpu_memory_total": 2}
    row = {"device": "cuda", "queues": ["winnow"], "engine_version": "1"}
    with transaction(engine) as session:
        session.add(WorkerHeartbeat(name="w", **row | gpu))
        unit = session.query(WorkUnit).filter_by(audit_id=audit.id).one()
        unit.state, unit.started_at, unit.finished_at = UnitState.DONE, long_ago(), unit.created_at
    client = client_of(settings, engine, celery)
    client.get("/healthz")
    found: Told = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_asks_for_what_is_told(told: Told) -> None:
    for expression in expressions():
        names = METRIC.findall(expression)
        assert names, expression
        assert set(names) <= set(told), expression
        for name, matchers in LABELS.findall(expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= told[name], expression
        known = {label for name in names for label in told[name]}
        for labels in BY.findall(expression):
            assert set(re.split(r",\s*", labels)) <= known, expression


def test_everything_that_is_told_is_shown_and_described(told: Told) -> None:
    """But for what the client library tells of the process."""
    own = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in told}
    own = {name for name in own if name.startswith("winnow_")} - {"winnow_build_info"}
    shown = " ".join(expressions())
    page = text_of("docs/operations.md")
    assert {name for name in own if name not in shown} == set()
    assert {name for name in own if f"`{name}" not in page} == set()


def test_the_page_names_nothing_that_is_not_told(told: Told) -> None:
    own = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in told}
    named = set(re.findall(r"`(winnow_[a-z_]+)", text_of("docs/operations.md")))
    assert named - {"winnow_tenant"} <= own


def test_labels_of_values_exist() -> None:
    """A state or an error code that nobody sets would never raise an alarm."""
    known = {*UnitState, "held", "expired", "0.5", "0.95", "1", "5.."}
    codes = {INTERNAL_ERROR, "worker_lost", "out_of_memory"}
    failures = " ".join(
        path.read_text()
        for folder in ("app/work", "workers/pipeline", "workers/influence")
        for path in Path(ROOT / folder).glob("*.py")
    )
    assert all(f'"{code}"' in failures for code in codes)
    for expression in expressions():
        for _, matchers in LABELS.findall(expression):
            for values in re.findall(r'"([^"]*)"', matchers):
                assert set(values.split("|")) <= known | codes, expression


def test_every_alert_says_what_to_do() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "action"}
            assert rule["labels"]["severity"] in {"page", "ticket"}


def test_panels_have_places_of_their_own() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
