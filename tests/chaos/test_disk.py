"""The disk fills up while the service works: it waits, says so, and goes on when there is room."""

import time
from pathlib import Path

import pytest

from tests.chaos import oracle
from tests.chaos.conftest import Site
from tests.chaos.programme import Programme

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]

CHUNK = bytes(1024**2)


def fill(path: Path) -> None:
    """Write until there is no room for another byte."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(CHUNK)
        except OSError:
            return


def test_a_full_disk_is_waited_for(site: Site) -> None:
    if site.why_not_small is not None:
        pytest.skip(site.why_not_small)
    cluster = site.cluster
    programme = Programme(cluster)
    programme.begin()
    filler = cluster.data_dir / "filler"
    fill(filler)
    try:
        cluster.wait_for(
            lambda: cluster.query("SELECT id FROM audits WHERE waiting = 'storage'"), seconds=60
        )
        (waiting,) = cluster.query("SELECT id FROM audits WHERE waiting = 'storage' LIMIT 1")
        assert cluster.http.get(f"/v1/audits/{waiting.id}").json()["waiting"] == "storage"
        ready = cluster.http.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["storage"]["ok"]) == (503, False)
        csv = {"file": ("more.csv", b"text,label\na,b\n")}
        assert cluster.http.post("/v1/datasets", files=csv).status_code == 507
        again = cluster.http.get(f"/v1/audits/{waiting.id}").json()["request"]
        assert cluster.http.post("/v1/audits", json=again).status_code == 507
        time.sleep(4)  # some rounds of the reconciler: nothing is tried in vain
        attempts = cluster.query("SELECT attempts FROM work_units WHERE waiting = 'storage'")
        assert {unit.attempts for unit in attempts} == {0}
    finally:
        filler.unlink()
    oracle.check(cluster, programme.end(), site.quiet, num_faults=1)
