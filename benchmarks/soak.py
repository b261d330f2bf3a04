"""Small audits through the real service for an hour: does anything grow that should not?

`winnow serve` runs with its embedded servers on a tiny model. A few audits are always under way;
each has an upload of its own, is paged, decided on, exported and deleted again. Every half minute
memory, file handles, connections, rows and files are looked at. What is told at the end is the
growth an hour after a warm-up of a quarter of the time, by least squares, and whether it is flat:
within two standard errors of no more than FLAT allows.

    .venv/bin/python -m benchmarks.soak [--minutes 60] [--every 30] [--at-once 3]

Rows of the trail, the idempotency keys and the workers' time are kept for days, by design; they
are shown, but not judged.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import psutil
from sqlalchemy import Engine, text

import app.tables  # noqa: F401  registers every table
from app.db import Base, make_engine
from app.embedded import embedded_postgres
from tests.pipeline.tiny import reviews, save_bert, write_table

FloatArray = npt.NDArray[np.float64]
KEPT_BY_DESIGN = {"rows: trail", "rows: idempotency_keys", "rows: worker_usage"}
WARM_UP = 0.25
# growth an hour that is still flat: a share of the level, or this much, whichever is more
FLAT_SHARE = 0.05
MIN_LOOKS = 5
FLAT = {"MB": 10.0, "files": 5.0, "": 3.0}


def main() -> None:
    """Run, print the figures and say whether they are flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=30, help="Seconds between two looks.")
    parser.add_argument("--at-once", type=int, default=3, help="Audits under way.")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="winnow-soak-")))
        process, http = stack.enter_context(serving(folder))
        url = stack.enter_context(embedded_postgres(folder / "data"))
        engine = make_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
        stack.callback(engine.dispose)
        load = Load(http, folder, at_once=options.at_once)
        looks = []
        started = time.monotonic()
        next_look = started
        while (now := time.monotonic()) < started + 60 * options.minutes:
            load.step()
            if now >= next_look:
                next_look += options.every
                look = _look(process, engine, folder / "data")
                looks.append((now - started, look))
                _tell(now - started, look, load)
            time.sleep(0.2)
    ok = _report(looks, load)
    raise SystemExit(0 if ok else 1)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[psutil.Process, httpx2.Client]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    roots = folder / "models"
    save_bert(roots / "bert")
    data_dir = folder / "data"
    environment = {
        **os.environ,
        "WINNOW_FILE_ROOTS": str(roots),
        "WINNOW_RECONCILE_SECONDS": "5",
        # their rows are kept as long: within the hour as many must go as come
        "WINNOW_LEFTOVER_SECONDS": "300",
        "OMP_NUM_THREADS": "1",
        "WINNOW_DEVICE": "cpu",
        "WINNOW_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "app", "serve"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--data-dir", str(data_dir)],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            _wait_until_ready(http, server, folder / "log")
            _fill_pool(http)
            yield psutil.Process(server.pid), http
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def _wait_until_ready(
    http: httpx2.Client, server: "subprocess.Popen[bytes]", log: Path, seconds: float = 300
) -> None:
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at and server.poll() is None:
        try:
            if http.get("/readyz").status_code == httpx2.codes.OK:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"The service did not start:\n{log.read_text()[-3000:]}")


def _fill_pool(http: httpx2.Client) -> None:
    """Ask for much at once: connections to the database grow up to the pool's size, and stay."""
    with ThreadPoolExecutor(max_workers=40) as pool:
        for response in pool.map(lambda _: http.get("/v1/audits"), range(400)):
            response.raise_for_status()


class Load:
    """A few audits at once, each with all that is done to one."""

    def __init__(self, http: httpx2.Client, folder: Path, *, at_once: int) -> None:
        self._http = http
        self._at_once = at_once
        self._open: set[str] = set()
        self._uploads: dict[str, str] = {}
        self.ended: Counter[str] = Counter()
        self._train = write_table(folder / "train.parquet", reviews(40, seed=0))
        validation = write_table(folder / "validation.parquet", reviews(10, seed=1))
        self._validation = self._upload(validation)["reference"]
        self._model = (folder / "models" / "bert").as_uri()

    def step(self) -> None:
        """Submit what is missing, and finish off what has ended."""
        while len(self._open) < self._at_once:
            self._open.add(self.submit())
        for audit_id in list(self._open):
            audit = self._ok(self._http.get(f"/v1/audits/{audit_id}")).json()
            if audit["done"]:
                self._use_up(audit)

    def submit(self) -> str:
        """Submit an audit with an upload of its own; return its id."""
        upload = self._upload(self._train)
        body: dict[str, Any] = {
            "model": {"reference": self._model},
            "train": {"reference": upload["reference"]},
            "validation": {"reference": self._validation},
            "estimators": ["grad_cosine"],
            "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
            "flag": {"fraction": 0.1},
            "max_tokens": 32,
        }
        if self.ended.total() % 5 == 0:
            body["fine_tune"] = {"epochs": 1}
        header = {"Idempotency-Key": os.urandom(8).hex()}
        made = self._ok(self._http.post("/v1/audits", json=body, headers=header)).json()
        self._uploads[made["id"]] = upload["id"]
        return str(made["id"])

    def _use_up(self, audit: dict[str, Any]) -> None:
        self.ended[audit["state"]] += 1
        self._open.remove(audit["id"])
        path = f"/v1/audits/{audit['id']}"
        if audit["state"] == "succeeded":
            self._ok(self._http.get(f"{path}/suspects?limit=20"))
            self._ok(self._http.get(f"{path}/suspects.parquet"))
            self._ok(self._http.get(f"{path}/report.html"))
            decision = {"action": "drop", "indices": [0, 1]}
            batch = self._ok(self._http.post(f"{path}/decisions", json=decision)).json()
            self._ok(self._http.get(f"{path}/export"))
            self._ok(self._http.post(f"{path}/decisions/{batch['id']}/undo"))
        self._ok(self._http.delete(path))
        self._ok(self._http.delete(f"/v1/datasets/{self._uploads.pop(audit['id'])}"))

    def _upload(self, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            answer = self._http.post("/v1/datasets", files={"file": (path.name, file)})
        made: dict[str, Any] = self._ok(answer).json()
        return made

    @staticmethod
    def _ok(answer: httpx2.Response) -> httpx2.Response:
        if not answer.is_success:
            raise SystemExit(f"{answer.request.method} {answer.request.url}: {answer.text}")
        return answer


def _look(server: psutil.Process, engine: Engine, data_dir: Path) -> dict[str, float]:
    """Return every figure by its name; its unit stands in front of the colon."""
    figures: dict[str, float] = {}
    for child in server.children():
        try:
            words = " ".join(child.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        name = "api" if "app.server" in words else "worker" if " worker" in words else None
        if name is not None:
            tree = [child, *child.children(recursive=True)]
            sizes = [_size(each) for each in tree]
            figures[f"MB: {name}"] = sum(memory for memory, _ in sizes) / 1e6
            figures[f"handles: {name}"] = sum(handles for _, handles in sizes)
    with engine.connect() as connection:
        figures["connections"] = connection.execute(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        ).scalar_one()
        for table in sorted(Base.metadata.tables):
            count = text(f"SELECT count(*) FROM {table}")
            figures[f"rows: {table}"] = connection.execute(count).scalar_one()
        size = text("SELECT pg_database_size(current_database()) / 1e6")
        figures["MB: database"] = float(connection.execute(size).scalar_one())
    figures["files: data directory"] = sum(
        len(files)
        for folder, _, files in os.walk(data_dir)  # it takes folders that vanish meanwhile
        if not Path(folder).is_relative_to(data_dir / "postgres")
    )
    return figures


def _size(process: psutil.Process) -> tuple[float, int]:
    """Return how much memory is the process's own, and its handles."""
    try:
        return float(process.memory_full_info().uss), process.num_fds()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended meanwhile
        return 0.0, 0


def _tell(seconds: float, look: dict[str, float], load: Load) -> None:
    shown = ("MB: api", "MB: worker", "handles: api", "handles: worker", "connections")
    told = "  ".join(f"{name} {look.get(name, 0):.0f}" for name in shown)
    files = look["files: data directory"]
    print(
        f"{seconds / 60:6.1f} min  {load.ended.total():5} audits  {told}  files {files:.0f}",
        flush=True,
    )


def _report(looks: list[tuple[float, dict[str, float]]], load: Load) -> bool:
    print(f"\n{dict(load.ended)} audits in {looks[-1][0] / 60:.0f} minutes, {len(looks)} looks")
    after = [(at, look) for at, look in looks if at >= WARM_UP * looks[-1][0]]
    hours = np.array([at / 3600 for at, _ in after])
    print(f"\n{'':32}{'first':>10}{'last':>10}{'most':>10}{'an hour':>10}")
    is_flat = not load.ended.get("failed")
    for name in sorted(after[-1][1]):
        values = np.array([look.get(name, 0.0) for _, look in after])
        slope, error = _slope(hours, values)
        unit = name.partition(":")[0]
        allowed = max(FLAT_SHARE * float(np.median(values)), FLAT.get(unit, FLAT[""]))
        verdict = (
            "by design"
            if name in KEPT_BY_DESIGN
            else "flat"
            if slope - 2 * error <= allowed
            else "GROWS"
        )
        is_flat &= verdict != "GROWS"
        print(
            f"{name:32}{values[0]:10.1f}{values[-1]:10.1f}{values.max():10.1f}{slope:+10.1f}"
            f"  {verdict}"
        )
    print("\nIt is flat." if is_flat else "\nSomething grows.")
    return is_flat


def _slope(hours: FloatArray, values: FloatArray) -> tuple[float, float]:
    """Return the growth an hour by least squares, with its standard error."""
    if len(hours) < MIN_LOOKS:
        return 0.0, 0.0
    (slope, _), covariance = np.polyfit(hours, values, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


if __name__ == "__main__":
    main()
