"""An audit from upload to download, as a pipeline does it."""

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Reviews, Service

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]


def test_an_audit_runs_from_upload_to_download(
    service: Service, request_body: dict[str, Any]
) -> None:
    """Submit, poll, page through the suspects, download all formats: one story, one result."""
    audit_id = service.submit(**request_body, metadata={"run": "7"})
    audit = service.finish(audit_id)

    assert audit["state"] == "succeeded", audit
    assert audit["progress"] == 1
    assert audit["metadata"] == {"run": "7"}
    assert (audit["num_train"], audit["num_validation"]) == (200, 60)
    assert audit["provenance"]["num_shards"] >= 5
    assert set(audit["timings"]) == {
        "prepare",
        "fine_tune",
        "validation",
        "gradients",
        "curvature",
        "influence",
        "aggregate",
    }
    results = audit["results"]
    assert results["num_flagged"] == 40
    assert results["num_noisy"] == 40
    assert results["labels"] == ["negative", "positive"]

    suspects: list[dict[str, Any]] = []
    path = f"/v1/audits/{audit_id}/suspects?limit=90"
    while True:
        page = service.http.get(path).json()
        suspects += page["data"]
        assert "lowest" in page["score_order"]
        if not page["has_more"]:
            break
        path = f"/v1/audits/{audit_id}/suspects?limit=90&cursor={page['next_cursor']}"
    assert [suspect["rank"] for suspect in suspects] == list(range(200))
    assert sorted(suspect["index"] for suspect in suspects) == list(range(200))
    scores = [suspect["score"] for suspect in suspects]
    assert scores == sorted(scores)

    bodies = {}
    for name in ("parquet", "csv", "jsonl"):
        answer = service.http.get(f"/v1/audits/{audit_id}/suspects.{name}")
        assert answer.status_code == 200
        assert hashlib.sha256(answer.content).hexdigest() == results["files"][name]["sha256"]
        assert answer.headers["etag"] == f'"{results["files"][name]["sha256"]}"'
        bodies[name] = answer.content
    parquet = pq.read_table(io.BytesIO(bodies["parquet"])).to_pylist()
    assert [orjson.loads(line) for line in bodies["jsonl"].splitlines()] == parquet
    rows = list(csv.DictReader(io.StringIO(bodies["csv"].decode())))
    assert [int(row["index"]) for row in rows] == [row["index"] for row in parquet]
    assert [row["index"] for row in parquet] == [suspect["index"] for suspect in suspects]

    worst = suspects[0]
    detail = service.http.get(f"/v1/audits/{audit_id}/samples/{worst['index']}").json()
    assert detail["text"] == worst["text"]
    whole = next(group for group in detail["layer_groups"] if group["layer_group"] == "all")
    assert (whole["rank"], whole["score"]) == (0, worst["score"])
    assert len(detail["harms_most"]) == 5
    harms = [sample["influence"] for sample in detail["harms_most"]]
    assert harms == sorted(harms)

    layers = service.http.get(f"/v1/audits/{audit_id}/layers").json()
    assert list(layers["layer_groups"]) == ["all", "00-01", "02-03", "04", "05", "CL"]
    oracle = next(row for row in layers["data"] if row["estimator"] == "oracle")
    assert oracle["detection"]["auc_ndr"] == 1.0

    another_ranking(service, audit)


def another_ranking(service: Service, audit: dict[str, Any]) -> None:
    """Rank by what the audit computed beside: a worker makes it, and the audit's own stays."""
    audit_id, own_id = audit["id"], audit["results"]["ranking_id"]
    assert audit["kept"]["influence_bytes"] > 0
    path = f"/v1/audits/{audit_id}/rankings"
    refused = service.http.post(path, json={"estimator": "ekfac"})
    assert refused.status_code == 422
    assert "it has grad_dot, grad_cosine, datainf" in refused.json()["detail"]

    body = {"estimator": "grad_cosine", "layers": "04-05", "aggregation": "median"}
    accepted = service.http.post(path, json=body)
    assert accepted.status_code == 202, accepted.text
    location = accepted.headers["location"]
    service.wait_for(lambda: bool(service.http.get(location).json()["done"]), seconds=60)
    ranking = service.http.get(location).json()
    assert ranking["state"] == "succeeded", ranking
    assert ranking["results"]["num_flagged"] == 40
    assert ranking["results"]["detection"]["auc_ndr"] > 0.5

    listed = service.http.get(path).json()["data"]
    assert [item["id"] for item in listed] == [own_id, ranking["id"]]
    file = service.http.get(ranking["results"]["files"]["jsonl"]["href"]).content
    assert hashlib.sha256(file).hexdigest() == ranking["results"]["files"]["jsonl"]["sha256"]
    page = service.http.get(f"{location}/suspects?limit=200").json()["data"]
    assert [row["index"] for row in page] == [
        orjson.loads(line)["index"] for line in file.splitlines()
    ]
    sample = service.http.get(f"{location}/samples/{page[0]['index']}").json()
    chosen = next(group for group in sample["layer_groups"] if group["layer_group"] == "04-05")
    assert (chosen["rank"], chosen["score"]) == (0, page[0]["score"])
    layers = service.http.get(f"{location}/layers").json()["data"]
    assert {(row["estimator"], row["aggregation"]) for row in layers} == {("grad_cosine", "median")}
    assert service.audit(audit_id)["results"]["ranking_id"] == own_id

    assert service.http.delete(location).status_code == 204
    assert service.http.get(location).status_code == 404


def test_a_copy_with_another_label_is_shown_as_what_opposes_it_most(
    service: Service, request_body: dict[str, Any], reviews: Reviews, tmp_path: Path
) -> None:
    """A reviewer who opens a suspect sees its near-duplicate with the other label first."""
    rows = list(csv.DictReader(reviews.train_csv.open(newline="")))
    original = {**rows[3], "text": rows[3]["text"].rstrip(" .")}
    other = next(row["label"] for row in rows if row["label"] != original["label"])
    copy = {**original, "text": original["text"] + " !", "label": other}
    path = tmp_path / "with_a_copy.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(original))
        writer.writeheader()
        writer.writerows([original, *rows[4:], copy])
    body = request_body | {"train": {"reference": service.upload(path)}, "plant_noise": None}
    audit = service.finish(audit_id := service.submit(**body))
    assert audit["state"] == "succeeded", audit

    first = service.http.get(f"/v1/audits/{audit_id}/samples/0").json()["most_opposed"][0]
    assert first["index"] == audit["num_train"] - 1
    assert first["given_label"] == other
    assert first["similarity"] < -0.9


def test_an_audit_that_cannot_be_done_says_what_to_change(
    service: Service, request_body: dict[str, Any]
) -> None:
    """What only the model can tell fails the audit with the field and the choices there are."""
    request_body["ranking"] = {"estimator": "grad_dot", "layers": "08-15"}
    del request_body["fine_tune"]
    request_body["fine_tune"] = {"epochs": 1}
    audit_id = service.submit(**request_body)

    audit = service.finish(audit_id)

    assert audit["state"] == "failed"
    assert audit["error"] == {
        "code": "unknown_layers",
        "message": "there is no block 15 for the layers '08-15': the model has 6, counted from 00; "
        "there are all, 00-01, 02-03, 04, 05, CL and the blocks 00 to 05.",
        "field": "ranking.layers",
    }
    answer = service.http.get(f"/v1/audits/{audit_id}/suspects")
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_cancelled_audit_stops_within_seconds(
    service: Service, request_body: dict[str, Any]
) -> None:
    """Cancel is seen by the worker in the middle of fine-tuning."""
    request_body["fine_tune"] = {"epochs": 50}
    audit_id = service.submit(**request_body)
    service.reach(audit_id, "fine_tune")

    assert service.http.post(f"/v1/audits/{audit_id}/cancel").status_code == 202

    assert service.finish(audit_id, seconds=15)["state"] == "cancelled"
