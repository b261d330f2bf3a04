"""Reports: one file that refers to nothing outside."""

import base64
import hashlib
import re
from html import unescape

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.audits.models import AuditState
from app.settings import Settings
from tests.factories import make_ended_audit, make_finished_audit, make_ranking
from tests.web.published import publish_audit, review_texts


@pytest.fixture
def report(client: TestClient, engine: Engine, settings: Settings) -> str:
    audit = publish_audit(engine, settings, texts=review_texts(400))
    return client.get(f"/v1/audits/{audit.id}/report.html").text


def test_a_report_tells_the_whole_audit(report: str) -> None:
    for told in (
        "Estimated wrong",
        "planted probes",
        "Given and suggested labels",
        "NDR@10",
        "AUC-NDR by the known noise",
        "The 100 most suspect samples",
        "Harms most, of the validation set",
    ):
        assert told in report
    assert report.count('<li class="suspect">') == 100
    assert len(report.encode()) < 2_000_000


def test_effort_fast_says_how_many_are_compared(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    for effort, is_said in (("fast", True), ("exact", False)):
        audit = publish_audit(engine, settings, texts=review_texts(200), effort=effort)
        report = client.get(f"/v1/audits/{audit.id}/report.html").text
        assert ("influence of the 60 samples with the highest losses" in report) == is_said


def test_a_report_refers_to_nothing_outside(report: str) -> None:
    assert not re.search(r"<(script|link|img|iframe|object)\b", report)
    assert not re.search(r"\b(src|href|action)=", report)
    assert "url(" not in report
    assert "@import" not in report
    (style,) = re.findall(r"<style>(.*)</style>", report, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in unescape(report)
    assert not re.search(r"<[^>]+\sstyle=", report)


def test_long_texts_are_cut(client: TestClient, engine: Engine, settings: Settings) -> None:
    audit = publish_audit(engine, settings, texts=["word " * 4000] * 120)
    report = client.get(f"/v1/audits/{audit.id}/report.html").text
    assert len(report.encode()) < 2_000_000


def test_it_is_sent_as_a_file(client: TestClient, engine: Engine, settings: Settings) -> None:
    audit = make_finished_audit(engine, settings)
    ranking = make_ranking(engine, audit, settings=settings)
    for path, name in (("", audit.id), (f"/rankings/{ranking.id}", ranking.id)):
        answer = client.get(f"/v1/audits/{audit.id}{path}/report.html")
        assert answer.status_code == 200
        expected = f'attachment; filename="{name}-report.html"'
        assert answer.headers["content-disposition"] == expected
        assert "style-src 'sha256-" in answer.headers["content-security-policy"]


def test_an_audit_without_results_has_no_report(client: TestClient, engine: Engine) -> None:
    audit = make_ended_audit(engine, AuditState.FAILED)
    answer = client.get(f"/v1/audits/{audit.id}/report.html")
    assert answer.status_code == 409
    assert answer.json()["code"] == "unsupported_model"
