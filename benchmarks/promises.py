"""What Winnow promises when something dies, measured with its default settings.

    .venv/bin/python -m benchmarks.promises

An API, two workers, PostgreSQL and a broker run as processes of their own; each measurement kills
or stops some of them, and waits. It takes about a quarter of an hour and prints a table.
"""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from tests.chaos.cluster import Cluster, running
from tests.pipeline.tiny import MAX_POSITIONS, reviews, save_encoder, write_table

REPEATS = 3
SUBMISSIONS = 20
OUTAGE_SECONDS = 20.0
# many small shards, so that there is always one at hand; all that is measured is as delivered
SETTINGS = {"WINNOW_SAMPLES_PER_SHARD": "100", "WINNOW_TOKENS_PER_BATCH": "64"}


class Bench:
    """A service with an audit that keeps its workers busy."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.audit_id = ""

    def request(self, *, epochs: int) -> dict[str, Any]:
        files = self.cluster.files
        return {
            "model": {"reference": f"file://{files / 'encoder'}"},
            "train": {"reference": f"file://{files / 'train.parquet'}"},
            "validation": {"reference": f"file://{files / 'trusted.parquet'}"},
            "fine_tune": {"epochs": epochs, "batch_size": 8},
            "estimators": ["grad_cosine"],
            "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
            "flag": {"fraction": 0.1},
            "max_tokens": MAX_POSITIONS,
        }

    def submit(self, *, epochs: int) -> str:
        answer = self.cluster.http.post("/v1/audits", json=self.request(epochs=epochs))
        answer.raise_for_status()
        return str(answer.json()["id"])

    def try_submit(self, *, epochs: int) -> bool:
        """Submit, and tell whether the service took it."""
        answer = self.cluster.http.post("/v1/audits", json=self.request(epochs=epochs))
        if answer.is_success:
            self.audit_id = str(answer.json()["id"])
        return answer.is_success

    def is_begun(self) -> bool:
        """Tell whether a worker has taken a unit of the audit."""
        statement = "SELECT sum(epoch) AS epochs FROM work_units WHERE audit_id = :audit"
        return bool(self._row(statement, audit=self.audit_id).epochs)

    def begin(self, stage: str, *, epochs: int = 1) -> None:
        """Submit an audit and wait until a worker is at a stage of it."""
        self.audit_id = self.submit(epochs=epochs)
        self.until(lambda: self.held(stage), seconds=400)

    def end(self) -> None:
        """Cancel what still runs."""
        self.cluster.http.post(f"/v1/audits/{self.audit_id}/cancel")
        self.until(lambda: self.state()["done"], seconds=120)

    def state(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.cluster.http.get(f"/v1/audits/{self.audit_id}").json()
        return answer

    def held(self, stage: str) -> list[Any]:
        """Return the units of a stage that a worker holds and has told of."""
        return self.cluster.query(
            "SELECT id, epoch, owner FROM work_units WHERE audit_id = :audit AND stage = :stage"
            " AND state = 'running' AND done > 0",
            audit=self.audit_id,
            stage=stage,
        )

    def unit(self, unit_id: str) -> Row[Any]:
        return self._row("SELECT * FROM work_units WHERE id = :id", id=unit_id)

    def _row(self, statement: str, **values: object) -> Row[Any]:
        (found,) = self.cluster.query(statement, **values)
        return found

    def num_again(self) -> int:
        """Return how many units of the audit were begun again, each as often as it was."""
        statement = (
            "SELECT sum(greatest(attempts - 1, 0)) AS again FROM work_units WHERE audit_id = :audit"
        )
        return int(self._row(statement, audit=self.audit_id).again)

    def until(self, holds: Callable[[], Any], *, seconds: float = 180) -> float:
        """Return after how many seconds something held."""
        started = time.monotonic()
        while True:
            with suppress(SQLAlchemyError, httpx2.TransportError):
                if holds():
                    return time.monotonic() - started
            if time.monotonic() - started > seconds:
                raise TimeoutError(self.cluster.tail())
            time.sleep(0.02)


def dead_worker(bench: Bench) -> tuple[float, float, int]:
    """Kill a worker; return when its unit is offered and taken, and how many units were redone."""
    bench.begin("fine_tune", epochs=100)
    ((unit_id, epoch, owner),) = bench.held("fine_tune")
    os.kill(int(owner.rpartition(":")[2]), signal.SIGKILL)
    killed = time.monotonic()
    bench.until(lambda: bench.unit(unit_id).state == "ready" or bench.unit(unit_id).epoch > epoch)
    offered = time.monotonic() - killed
    bench.until(lambda: bench.unit(unit_id).epoch > epoch)
    taken = time.monotonic() - killed
    again = bench.num_again()
    bench.end()
    return offered, taken, again


def after_broker(bench: Bench) -> float:
    """Take the broker away, submit meanwhile; return how long after its return work begins."""
    bench.cluster.kill_broker()
    bench.audit_id = bench.submit(epochs=1)
    time.sleep(OUTAGE_SECONDS)
    bench.cluster.start_broker()
    return bench.until(bench.is_begun)


def after_database(bench: Bench) -> tuple[float, float]:
    """Take the database away from a running unit; return when its lease is renewed after that.

    And when an audit begins that is submitted as soon as the API takes it.
    """
    bench.begin("fine_tune", epochs=100)
    running = bench.audit_id
    ((unit_id, *_),) = bench.held("fine_tune")
    bench.cluster.stop_database()
    time.sleep(OUTAGE_SECONDS)
    bench.cluster.start_database()
    back, lease = time.monotonic(), bench.unit(unit_id).lease_until
    bench.until(lambda: bench.try_submit(epochs=1))
    bench.until(bench.is_begun)
    begun = time.monotonic() - back
    bench.until(lambda: bench.unit(unit_id).lease_until != lease)
    renewed = time.monotonic() - back
    assert bench.unit(unit_id).attempts == 1, "an outage shorter than a lease costs no try"
    bench.end()
    bench.audit_id = running
    bench.end()
    return begun, renewed


def cancel(bench: Bench) -> float:
    bench.begin("fine_tune", epochs=100)
    started = time.monotonic()
    bench.cluster.http.post(f"/v1/audits/{bench.audit_id}/cancel").raise_for_status()
    bench.until(lambda: bench.state()["state"] == "cancelled")
    return time.monotonic() - started


def submissions(bench: Bench) -> list[float]:
    """Return the milliseconds that callers wait for the answer to a submission."""
    times = []
    for _ in range(SUBMISSIONS):
        started = time.perf_counter()
        bench.audit_id = bench.submit(epochs=1)
        times.append(1000 * (time.perf_counter() - started))
        bench.cluster.http.post(f"/v1/audits/{bench.audit_id}/cancel").raise_for_status()
    return times


def drain(bench: Bench) -> tuple[float, float]:
    """Send SIGTERM to the worker of a unit; return when the unit is given back and it has ended."""
    bench.begin("fine_tune", epochs=100)
    ((unit_id, epoch, owner),) = bench.held("fine_tune")
    child = int(owner.rpartition(":")[2])
    (worker,) = [
        member
        for member in bench.cluster.workers
        if child in {process.pid for process in member.children()}
    ]
    process, started = worker.process, time.monotonic()
    process.terminate()
    bench.until(lambda: bench.unit(unit_id).epoch > epoch or bench.unit(unit_id).state == "ready")
    given_back = time.monotonic() - started
    process.wait(120)
    ended = time.monotonic() - started
    assert bench.unit(unit_id).attempts <= 1, "a drained unit keeps its try"
    bench.end()
    return given_back, ended


def row(what: str, promise: str, values: list[float], unit: str) -> None:
    worst, middle = max(values), statistics.median(values)
    print(f"| {what} | {promise} | {middle:.3g} {unit} | {worst:.3g} {unit} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="promises-") as name:
        folder, files = Path(name), Path(name) / "files"
        files.mkdir()
        save_encoder(files / "encoder")
        for part, number in (("train", 6000), ("trusted", 50)):
            write_table(files / f"{part}.parquet", reviews(number, seed=0))
        folder.chmod(0o755)  # the database runs as a user of its own
        with running(folder, data_dir=folder / "data", files=files, settings=SETTINGS) as cluster:
            measure(Bench(cluster))


def measure(bench: Bench) -> None:
    cluster = bench.cluster
    print("| | promise | median | longest |\n|---|---|---|---|", flush=True)
    cancelled = [cancel(bench) for _ in range(REPEATS)]
    row("cancel: from the call to the state `cancelled`", "5 s", cancelled, "s")
    drained = [drain(bench) for _ in range(REPEATS)]
    row("SIGTERM to a worker: its unit is given back", "", [each[0] for each in drained], "s")
    row("SIGTERM to a worker: it has ended", "90 s", [each[1] for each in drained], "s")
    row("submit, everything there", "", submissions(bench), "ms")
    cluster.kill_broker()
    row("submit, broker gone", "works", submissions(bench), "ms")
    cluster.start_broker()
    cluster.proxy.freeze()
    row("submit, broker frozen", "works", submissions(bench), "ms")
    cluster.proxy.thaw()
    broker = [after_broker(bench) for _ in range(REPEATS)]
    row(f"broker back after {OUTAGE_SECONDS:g} s: work begins", "30 s", broker, "s")
    database = [after_database(bench) for _ in range(REPEATS)]
    row(
        f"database back after {OUTAGE_SECONDS:g} s: work begins",
        *("30 s", [each[0] for each in database], "s"),
    )
    row("the same: a unit at hand goes on", "30 s", [each[1] for each in database], "s")
    dead = [dead_worker(bench) for _ in range(REPEATS)]
    row("kill -9 of a worker: its unit is offered again", "75 s", [each[0] for each in dead], "s")
    row("kill -9 of a worker: another has taken it", "", [each[1] for each in dead], "s")
    again = [float(each[2]) for each in dead]
    row("units begun again for one crash", "1", again, "times")


if __name__ == "__main__":
    main()
