"""From a CSV to a cleaned CSV: upload, audit, decide on a whole filter, export, all over HTTP."""

import csv
import hashlib
import io
from typing import Any

import orjson
import pytest

from tests.e2e.conftest import Reviews, Service

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]


def rows_of(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def test_a_csv_is_cleaned_by_decisions_on_whole_filters(
    service: Service, reviews: Reviews, request_body: dict[str, Any]
) -> None:
    """What a worker audited and reviewers decided is in the file, and nothing else has changed."""
    del request_body["plant_noise"]
    request_body |= {
        "estimators": ["grad_cosine"],
        "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
    }
    audit_id = service.submit(**request_body)
    audit = service.finish(audit_id, seconds=300)
    assert audit["state"] == "succeeded", audit
    original = reviews.train_csv.read_bytes()
    assert audit["provenance"]["train_file"] == {
        "format": "csv",
        "bytes": len(original),
        "sha256": hashlib.sha256(original).hexdigest(),
    }
    path = f"/v1/audits/{audit_id}"

    assert service.http.get(f"{path}/export").content == original
    suspects = service.http.get(f"{path}/suspects?limit=1000").json()["data"]
    index_of = {"positive": "negative", "negative": "positive"}
    accepted = {
        of["index"]: of["suggested_label"]
        for of in suspects
        if of["flagged"] and of["suggested_label"] == index_of[of["given_label"]]
    }
    dropped = {of["index"] for of in suspects if of["flagged"]} - accepted.keys()
    assert len(accepted) + len(dropped) == 40

    for given, suggested in index_of.items():
        where = {"flagged": True, "label": given, "suggested_label": suggested}
        body = {"action": "accept", "filter": where, "reviewer": "anna", "as_of": None}
        answer = service.http.post(f"{path}/decisions", json=body)
        assert answer.status_code == 201, answer.text
    body = {"action": "drop", "filter": {"flagged": True, "decision": "none"}, "reviewer": "ben"}
    preview = service.http.post(f"{path}/decisions/preview", json=body).json()
    assert preview["num_samples"] == len(dropped)
    assert service.http.post(f"{path}/decisions", json=body).json()["num_changed"] == len(dropped)
    mistake = service.http.post(
        f"{path}/decisions", json={"action": "drop", "filter": {}, "reviewer": "ben"}
    ).json()
    assert service.http.post(f"{path}/decisions/{mistake['id']}/undo").status_code == 200

    stored = service.audit(audit_id)
    assert (stored["num_decided"], stored["decision_version"]) == (40, 5)
    export = service.http.get(f"{path}/export")
    assert 'filename="train-cleaned.csv"' in export.headers["content-disposition"]
    expected = [
        {**row, "label": accepted.get(index, row["label"])}
        for index, row in enumerate(rows_of(original))
        if index not in dropped
    ]
    assert rows_of(export.content) == expected
    lines = [
        orjson.loads(line) for line in service.http.get(f"{path}/export/patch").content.splitlines()
    ]
    assert {line["index"] for line in lines if line["change"] == "drop"} == dropped
    assert {
        line["index"]: line["after"] for line in lines if line["change"] == "relabel"
    } == accepted
    assert {line["reviewer"] for line in lines} <= {"anna", "ben"}
