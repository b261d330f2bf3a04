"""The command as a gate in a pipeline: the real service, a real worker, exit codes."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL, Reviews, Service

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]

RANK = ("--estimator", "grad_cosine", "--aggregation", "rank")
WINNOW = Path(sys.executable).with_name("winnow")


def environment(service: Service) -> dict[str, str]:
    return {**os.environ, "WINNOW_URL": f"http://127.0.0.1:{service.port}", "COLUMNS": "120"}


def winnow(service: Service, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [WINNOW, *map(str, arguments)],
        env=environment(service),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def run_options(reviews: Reviews) -> list[str | Path]:
    return [
        *("audit", "run", "--model", MODEL, "--train", reviews.train_csv),
        *("--validation", reviews.validation_jsonl, "--epochs", "3", "--plant-noise", "30%"),
        *("--layers", "all", *RANK),
        *("--set", "max_tokens=64", "--set", "fine_tune.learning_rate=0.001", "--name", "gate"),
    ]


def test_a_pipeline_stops_at_noisy_data_and_takes_what_the_limit_allows(
    service: Service, reviews: Reviews, tmp_path: Path
) -> None:
    stopped = winnow(service, *run_options(reviews), "--wait", "--fail-over", "2%", "--json")
    assert stopped.returncode == 1, stopped.stderr
    audit = json.loads(stopped.stdout)
    assert audit["gate"]["passed"] is False
    assert audit["gate"]["share"] > 0.02
    assert audit["request"]["flag"] == "auto"
    assert "Too many suspects" in stopped.stderr
    assert f"{audit['id']} gradients" in stopped.stderr

    passed = winnow(service, "audit", "wait", audit["id"], "--fail-over", "90%")
    assert passed.returncode == 0, passed.stderr
    assert "Clean" in passed.stderr
    assert "samples are flagged" in passed.stdout

    listed = winnow(service, "audit", "list")
    assert "gate" in listed.stdout
    suspects = json.loads(winnow(service, "suspects", audit["id"], "--flagged", "--json").stdout)
    assert len(suspects) == min(20, audit["results"]["num_flagged"])

    clean = tmp_path / "clean.csv"
    exported = winnow(service, "export", audit["id"], "--apply", "drop", "-o", clean)
    assert exported.returncode == 0, exported.stderr
    with reviews.train_csv.open(newline="") as before, clean.open(newline="") as after:
        rows, kept = list(csv.DictReader(before)), list(csv.DictReader(after))
    assert len(kept) < len(rows)
    assert all(row in rows for row in kept)
    changes = [json.loads(line) for line in Path(f"{clean}.patch.jsonl").read_text().splitlines()]
    assert {change["change"] for change in changes} == {"drop"}
    assert len(changes) == len(rows) - len(kept)

    ranked = winnow(service, "rank", audit["id"], "--layers", "04-05", *RANK, "--wait", "--json")
    assert ranked.returncode == 0, ranked.stderr
    assert json.loads(ranked.stdout)["state"] == "succeeded"
    assert winnow(service, "doctor").returncode == 0


def test_ctrl_c_ends_the_waiting_and_not_the_audit(service: Service, reviews: Reviews) -> None:
    with subprocess.Popen(
        [WINNOW, *map(str, run_options(reviews)), "--wait"],
        env=environment(service),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as waiting:
        assert waiting.stderr
        first = next(line for line in waiting.stderr if "%" in line)
        audit_id = first.split()[0]
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=120)
    assert waiting.returncode == 130
    assert f"winnow audit show {audit_id} --wait" in said
    assert "Traceback" not in said
    assert not service.audit(audit_id)["done"]
    assert winnow(service, "audit", "cancel", audit_id).returncode == 0
    ended = winnow(service, "audit", "show", audit_id, "--wait")
    assert ended.returncode == 3
    assert "was cancelled" in ended.stderr
