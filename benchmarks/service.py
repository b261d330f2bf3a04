"""What the service costs beside the least that could do the same, in one run.

    .venv/bin/python -m benchmarks.service [poll] [--seconds 3] [--rounds 5]

poll: where an audit stands (GET /v1/audits/{id} with a key, through the real process), against
`benchmarks.bare_endpoint`: answers a second of 16 connections, and the CPU time of one answer.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import Engine

from app.audits.models import Audit, AuditState
from app.audits.schemas import AuditRequest
from app.db import make_engine, new_id, transaction
from app.embedded import embedded_postgres, embedded_valkey
from app.keys.service import create_key
from app.migrate import migrate
from app.settings import Settings
from app.work.models import Stage
from app.work.states import enter_state
from benchmarks.http_load import Connection, closed_loop, get
from benchmarks.pages import REQUEST
from benchmarks.service_rows import downloads, ranked_set, rows_in, rows_out
from workers.celery_app import LIBRARIES

CONNECTIONS = 16
PARTS = ("poll", "rows")


@dataclass(frozen=True)
class Service:
    """A database with a key, and the processes that serve it."""

    engine: Engine
    database_url: str
    key: str
    api: int
    bare: int
    processes: dict[int, psutil.Process]

    def cpu_seconds(self, port: int) -> float:
        """Return the CPU time of a server since it began."""
        times = self.processes[port].cpu_times()
        return float(times.user + times.system)


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """Run the API and the bare endpoint on one database."""
    with ExitStack() as stack:
        url = stack.enter_context(embedded_postgres(folder))
        broker = stack.enter_context(embedded_valkey())
        settings = Settings(database_url=url, broker_url=broker, data_dir=folder)
        engine = make_engine(settings.require_database_url())
        stack.callback(engine.dispose)
        migrate(engine)
        key = create_key(engine, tenant="default", name="benchmark", valid_days=1).secret
        environment = {
            "WINNOW_DATABASE_URL": url,
            "WINNOW_BROKER_URL": broker,
            "WINNOW_DATA_DIR": str(folder),
        }
        commands = [["app.server"], ["benchmarks.bare_endpoint"]]
        ports, processes = [], {}
        for command, rest in zip(commands, [[], [url]], strict=True):
            port, process = stack.enter_context(_served(command[0], rest, environment, folder))
            ports.append(port)
            processes[port] = process
        api, bare = ports
        yield Service(engine, url, key, api, bare, processes)


@contextmanager
def _served(
    module: str, rest: list[str], environment: dict[str, str], folder: Path
) -> Iterator[tuple[int, psutil.Process]]:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=2048) as listener,
        (folder / f"{module}.log").open("wb") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(listener.fileno()), *rest],
            env=os.environ | environment,
            pass_fds=[listener.fileno()],
            stdout=log,
            stderr=log,
        )
        try:
            yield listener.getsockname()[1], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(20)


def running_audit(engine: Engine) -> str:
    """Insert an audit that is at work, as those are that callers poll."""
    request = AuditRequest.model_validate(REQUEST).stored()
    audit = Audit(id=new_id("aud"), tenant="default", request=request, state_times={}, version=0)
    for state in (AuditState.QUEUED, AuditState.PREPARING, AuditState.COMPUTING):
        enter_state(audit, state)
    audit.stage, audit.progress = Stage.GRADIENTS, 0.37
    audit.samples_per_second, audit.eta_seconds = 312.5, 64.0
    audit.num_train, audit.num_validation = 20_000, 500
    with transaction(engine) as session:
        session.add(audit)
    return audit.id


def polls(of: Service, *, seconds: float, rounds: int) -> None:
    """Print both servers' answers a second, and what an answer costs."""
    path = f"/v1/audits/{running_audit(of.engine)}"
    requests = {of.bare: get(path), of.api: get(path, Authorization=f"Bearer {of.key}")}
    for port, request in requests.items():
        _wait(port, request)
        closed_loop(port, request, connections=CONNECTIONS, seconds=1)
    rates: dict[int, list[float]] = {port: [] for port in requests}
    costs: dict[int, list[float]] = {port: [] for port in requests}
    for _ in range(rounds):
        for port, request in requests.items():
            before = of.cpu_seconds(port)
            rate = closed_loop(port, request, connections=CONNECTIONS, seconds=seconds)
            rates[port].append(rate)
            costs[port].append((of.cpu_seconds(port) - before) / (rate * seconds))
    print(f"status polls, {CONNECTIONS} connections, median of {rounds} rounds of {seconds:g} s")
    for name, port in (("bare psycopg endpoint", of.bare), ("GET /v1/audits/{id}", of.api)):
        rate, cost = statistics.median(rates[port]), statistics.median(costs[port])
        print(f"{name:24} {rate:8.0f} a second {1e6 * cost:8.0f} µs CPU of the server each")
    ratios = [ours / bare for ours, bare in zip(rates[of.api], rates[of.bare], strict=True)]
    print(f"{'ratio':24} {statistics.median(ratios):8.2f}")


def _wait(port: int, request: bytes, seconds: float = 60) -> None:
    """Wait until a server answers."""
    give_up_at = time.monotonic() + seconds
    connection = Connection(port)
    connection.socket.settimeout(seconds)
    connection.send(request)
    while connection.receive() is None and time.monotonic() < give_up_at:
        pass
    connection.socket.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="|".join(PARTS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not os.environ.items() >= LIBRARIES.items():  # as in a worker, read before main begins
        os.environ.update(LIBRARIES)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.service", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name, service(Path(name)) as running:
        if "poll" in options.parts:
            polls(running, seconds=options.seconds, rounds=options.rounds)
        if "rows" in options.parts:
            _rows(running, Path(name), options.rows)


def _rows(of: Service, folder: Path, number: int) -> None:
    ranked, evidence = ranked_set(folder, number)
    audit_id, ranking_id = rows_in(of.engine, ranked, evidence)
    rows_out(of.engine, ranked, folder, audit_id=audit_id, ranking_id=ranking_id)
    downloads(of.api, of.key, of.processes[of.api], audit_id=audit_id)


if __name__ == "__main__":
    main()
