"""How long until something answers: the command, the API, a worker.

Each in a process of its own, started anew, on the embedded servers: wall-clock and CPU seconds,
medians; and which imports of the API take longest.

    .venv/bin/python -m benchmarks.startup [--repeats 5]
"""

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from sqlalchemy import Engine, func, select

from app.db import make_engine, transaction
from app.embedded import embedded_postgres, embedded_valkey
from app.migrate import migrate
from app.settings import Settings
from app.work.models import WorkerHeartbeat
from benchmarks.http_load import Connection, get

COMMAND = [sys.executable, "-c", "from winnow.cli import main; main()", "--help"]
NUM_IMPORTS = 8
LONG_WAIT = 120.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        embedded_postgres(Path(name)) as url,
        embedded_valkey() as broker,
    ):
        settings = Settings(database_url=url, broker_url=broker, data_dir=Path(name))
        engine = make_engine(settings.require_database_url())
        migrate(engine)
        environment = {
            "WINNOW_DATABASE_URL": url,
            "WINNOW_BROKER_URL": broker,
            "WINNOW_DATA_DIR": name,
            "WINNOW_DEVICE": "cpu",
        }
        starts: dict[str, Callable[[], tuple[float, float]]] = {
            "winnow --help": _help,
            "API answers": lambda: _api(environment),
            "worker is there": lambda: _worker(environment, engine),
        }
        for title, start in starts.items():
            walls, cpus = zip(*(start() for _ in range(options.repeats)), strict=True)
            wall, cpu = statistics.median(walls), statistics.median(cpus)
            print(f"{title:16} {wall:6.2f} s of the clock {cpu:6.2f} s of CPU", flush=True)
        engine.dispose()
    _imports()


def _help() -> tuple[float, float]:
    before, began = os.times(), time.monotonic()
    subprocess.run(COMMAND, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system
    return time.monotonic() - began, cpu - before.children_user - before.children_system


def _api(environment: dict[str, str]) -> tuple[float, float]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        command = [sys.executable, "-m", "app.server", str(listener.fileno())]
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            connection = Connection(listener.getsockname()[1])
            connection.socket.settimeout(LONG_WAIT)
            connection.send(get("/healthz"))
            while connection.receive() is None:
                pass
            wall = time.monotonic() - began
            return wall, _cpu(process)
        finally:
            process.terminate()
            process.wait(LONG_WAIT)


def _worker(environment: dict[str, str], engine: Engine) -> tuple[float, float]:
    with transaction(engine) as session:
        since = session.scalar(select(func.clock_timestamp()))
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "worker"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = select(func.count()).where(WorkerHeartbeat.seen_at > since)
        while time.monotonic() < began + LONG_WAIT:
            with transaction(engine) as session:
                if session.scalar(seen):
                    break
            time.sleep(0.05)
        return time.monotonic() - began, _cpu(process)
    finally:
        process.terminate()
        process.wait(LONG_WAIT)


def _cpu(process: "subprocess.Popen[bytes]") -> float:
    """Return the CPU seconds of a process and those that it started."""
    whole = psutil.Process(process.pid)
    times = [each.cpu_times() for each in (whole, *whole.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _imports() -> None:
    """Print what the API imports, what took longest by itself first."""
    command = [sys.executable, "-X", "importtime", "-c", "import app.server"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    own: dict[str, int] = {}
    for line in told.splitlines():
        if found := re.fullmatch(r"import time:\s+(\d+) \|\s+\d+ \| *(\S+)", line):
            package = found[2].partition(".")[0]
            own[package] = own.get(package, 0) + int(found[1])
    print(f"imports of the API: {sum(own.values()) / 1000:.0f} ms, of these")
    for package in sorted(own, key=lambda name: -own[name])[:NUM_IMPORTS]:
        print(f"  {package:16} {own[package] / 1000:6.0f} ms")


if __name__ == "__main__":
    main()
