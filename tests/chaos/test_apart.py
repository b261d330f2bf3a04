"""Two workers and an API on three machines, as far as files go: a bucket is all that they share."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.failpoints import DAWDLE_SECONDS
from tests.buckets import MotoBucket, moto_bucket
from tests.chaos.cluster import HASTY, Cluster, running
from tests.chaos.programme import base_request

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("apart"), pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Machines:
    cluster: Cluster
    bucket: MotoBucket

    def submit(self) -> str:
        """Upload the training set, and submit an audit of it whose shards are many."""
        with (self.cluster.files / "train.parquet").open("rb") as file:
            upload = self.cluster.http.post("/v1/datasets", files={"file": ("train.parquet", file)})
        body = base_request(self.cluster) | {
            "train": {"reference": f"upload:{upload.json()['id']}"},
            "estimators": ["datainf", "ekfac", "grad_cosine"],
            "ranking": {"estimator": "datainf", "layers": "all", "aggregation": "rank"},
            "flag": {"fraction": 0.2},
        }
        answer = self.cluster.http.post("/v1/audits", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def finish(self, audit_id: str) -> dict[str, Any]:
        path = f"/v1/audits/{audit_id}"
        self.cluster.wait_for(lambda: self.cluster.http.get(path).json()["done"], seconds=200)
        audit: dict[str, Any] = self.cluster.http.get(path).json()
        assert audit["state"] == "succeeded", audit
        return audit

    def sha256(self, audit: dict[str, Any]) -> str:
        """Of the ranking as the API sends it."""
        answer = self.cluster.http.get(f"/v1/audits/{audit['id']}/suspects.parquet")
        found = hashlib.sha256(answer.content).hexdigest()
        assert found == audit["results"]["files"]["parquet"]["sha256"]
        return found


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("apart")
    with moto_bucket() as bucket:
        settings = HASTY | bucket.environment | {"WINNOW_STRAGGLER_SECONDS": "1"}
        settings |= {"WINNOW_LEASE_SECONDS": "10", "WINNOW_LEFTOVER_SECONDS": "600"}
        settings |= {"WINNOW_SAMPLES_PER_SHARD": "6"}
        own = [folder / "one", folder / "other"]
        with running(
            folder, data_dir=folder / "api", files=files, settings=settings, worker_dirs=own
        ) as cluster:
            yield Machines(cluster, bucket)


@pytest.fixture(scope="module")
def quiet(machines: Machines) -> dict[str, Any]:
    return machines.finish(machines.submit())


def test_both_work_on_one_audit_and_the_api_has_all_of_it(
    machines: Machines, quiet: dict[str, Any]
) -> None:
    """What was uploaded to one machine is audited on two others, and comes back as a file."""
    machines.sha256(quiet)
    for worker in ("one", "other"):
        folder = machines.cluster.folder / worker / "audits" / quiet["id"]
        assert any((folder / "facts").iterdir()), f"worker {worker} did nothing"
    answer = machines.cluster.http.get(f"/v1/audits/{quiet['id']}/export?suspects=drop")
    assert answer.status_code == 200, answer.text
    assert answer.content[:4] == b"PAR1"


def test_a_shard_in_slow_hands_does_not_hold_the_audit_back(
    machines: Machines, quiet: dict[str, Any]
) -> None:
    """A worker dawdles over its first shard; the other does all the rest, and that one too."""
    cluster = machines.cluster
    order = cluster.order("unit.started@gradients", "dawdle")
    audit_id = machines.submit()
    audit = machines.finish(audit_id)
    assert cluster.taken_by(order)
    assert machines.sha256(audit) == machines.sha256(quiet)
    (copied,) = cluster.query(
        "SELECT stage, state, attempts, extract(epoch FROM finished_at - started_at) AS seconds,"
        " slower_owner FROM work_units"
        " WHERE audit_id = :audit AND attempts > 1",
        audit=audit_id,
    )
    assert (copied.stage, copied.state, copied.attempts) == ("gradients", "done", 2)
    assert copied.slower_owner is not None
    assert copied.seconds < DAWDLE_SECONDS


def test_an_audit_that_is_deleted_is_gone_from_the_bucket(
    machines: Machines, quiet: dict[str, Any]
) -> None:
    assert machines.bucket.names(f"audits/{quiet['id']}")
    assert machines.cluster.http.delete(f"/v1/audits/{quiet['id']}").status_code == 204
    assert machines.bucket.names(f"audits/{quiet['id']}") == []
