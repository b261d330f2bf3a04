"""A causal language model from upload to download: fine-tuned, audited with every estimator."""

import csv
import io
from pathlib import Path

import orjson
import pytest

from tests.e2e.conftest import Service
from tests.pipeline import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]

ESTIMATORS = [
    "grad_covariance",
    "datainf",
    "lissa",
    "gauss_newton",
    "ekfac",
    "tracin",
    "tracin_we_topk",
    "repsim",
    "self_influence",
]


def test_prompts_with_completions_run_from_upload_to_download(
    service: Service, tmp_path: Path
) -> None:
    root = Path(service.environment["WINNOW_FILE_ROOTS"].split(":")[1])
    model = tiny.save_llama(root / "llama")
    references = []
    for number, seed in ((60, 0), (12, 1)):
        table = tiny.instructions(number, seed=seed)
        path = tmp_path / f"{number}.jsonl"
        samples = zip(table["prompt"], table["completion"], strict=True)
        path.write_bytes(
            b"".join(orjson.dumps({"prompt": p, "completion": c}) + b"\n" for p, c in samples)
        )
        references.append(service.upload(path))
    train, validation = references

    audit_id = service.submit(
        task="causal_lm",
        model={"reference": model.as_uri()},
        train={"reference": train},
        validation={"reference": validation},
        fine_tune={"epochs": 3, "learning_rate": 2e-2},
        plant_noise={"fraction": 0.2},
        estimators=ESTIMATORS,
        aggregations=["rank", "median", "common_set"],
        ranking={"estimator": "grad_cosine", "layers": "00,01", "aggregation": "trimmed_mean"},
    )
    audit = service.finish(audit_id)

    assert audit["state"] == "succeeded", audit
    assert {"checkpoints", "curvature", "influence"} <= set(audit["timings"])
    results = audit["results"]
    assert results["preflight"]["max_gradient_error"] < 1e-4
    assert results["cancellation"]["all"]["l2"] >= 1
    page = service.http.get(f"/v1/audits/{audit_id}/suspects?limit=3").json()
    worst = page["data"][0]
    assert worst["given_label"] is None
    assert 0 < worst["given_probability"] < 1
    detail = service.http.get(f"/v1/audits/{audit_id}/samples/{worst['index']}").json()
    assert {group["layer_group"] for group in detail["layer_groups"]} == {
        "all",
        "00",
        "01",
        "00,01",
    }
    assert len(detail["harms_most"]) == 5
    rows = list(
        csv.DictReader(io.StringIO(service.http.get(f"/v1/audits/{audit_id}/suspects.csv").text))
    )
    assert len(rows) == 60
    assert (rows[0]["text"], rows[0]["text_pair"]) == (worst["text"], worst["text_pair"])
    layers = service.http.get(f"/v1/audits/{audit_id}/layers").json()
    assert {row["estimator"] for row in layers["data"]} == {
        *ESTIMATORS,
        "grad_cosine",
        "loss",
        "random",
        "oracle",
    }
    assert {row["aggregation"] for row in layers["data"]} == {
        "rank",
        "median",
        "common_set",
        "trimmed_mean",
        None,
    }
