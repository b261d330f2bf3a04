"""`winnow serve`: the whole service on one machine, started and stopped together."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import structlog
from pydantic import SecretStr
from sqlalchemy import Engine

from app.child import start_child
from app.db import make_engine
from app.embedded import (
    EmbeddedPostgres,
    EmbeddedValkey,
    data_directory,
    kept_postgres,
    kept_valkey,
)
from app.keys.service import has_active_keys
from app.logs import configure_logging
from app.middleware import is_loopback_host
from app.migrate import migrate
from app.server import RefusedToStart, open_socket
from app.settings import Settings
from app.work.restart import give_back_all_work

START_SECONDS = 60.0
API_GRACE_SECONDS = 10.0
WORKER_GRACE_SECONDS = 30.0
LOOK_SECONDS = 0.2
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  to be replaced, not bound

log = structlog.get_logger()


def serve(settings: Settings, *, num_workers: int | None) -> None:
    """Run the service until SIGINT or SIGTERM, then stop all of it.

    Args:
        settings: servers that they name are used; those that they do not name are started.
        num_workers: worker processes; by default one per GPU, or one.

    Raises:
        RefusedToStart: keys are needed and there are none, the address is taken, or the API
            does not come up.
        DataDirectoryInUse: another service runs on the same folder.
    """
    is_own = settings.database_url is None and settings.broker_url is None
    # Whoever can reach the port can use the service, so only a port of this machine alone, on a
    # database of this service alone, goes without keys.
    needs_keys = not (is_own and is_loopback_host(settings.host))
    if sys.stderr.isatty() and "log_format" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_format": "console"})
    configure_logging(settings.log_format)
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_stop_signals(stop))
        listener = stack.enter_context(open_socket(settings.host, settings.port))
        settings, servers = _with_servers(stack, settings, require_keys=needs_keys)
        engine = make_engine(settings.require_database_url())
        stack.callback(engine.dispose)
        migrate(engine)
        if needs_keys and not has_active_keys(engine):
            raise RefusedToStart(_how_to_make_a_key(settings, is_own=is_own))
        if is_own:
            _give_back(engine)
        crew = stack.enter_context(_crew(settings, listener, num_workers))
        _wait_for_api(crew[0], listener, stop)
        if not stop.is_set():
            _greet(settings, listener)
        while not stop.wait(LOOK_SECONDS):
            _look_after(servers)
            for member in crew:
                member.look()


def _give_back(engine: Engine) -> None:
    # This process holds the data directory and the broker is new: nobody else can hold work.
    held = give_back_all_work(engine)
    if held:
        log.info("work_taken_up_again", units=held)


Server = EmbeddedPostgres | EmbeddedValkey


def _with_servers(
    stack: ExitStack, settings: Settings, *, require_keys: bool
) -> tuple[Settings, list[Server]]:
    """Start the servers that the settings do not name."""
    given: dict[str, object] = {"require_keys": require_keys}
    servers: list[Server] = []
    if settings.database_url is None:
        stack.enter_context(data_directory(settings.data_dir))
        servers.append(stack.enter_context(kept_postgres(settings.data_dir)))
        given["database_url"] = SecretStr(servers[-1].url)
    if settings.broker_url is None:
        servers.append(stack.enter_context(kept_valkey()))
        given["broker_url"] = SecretStr(servers[-1].url)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return settings.model_copy(update=given), servers


def _look_after(servers: list[Server]) -> None:
    """Start servers again that were killed; what they hold, or lose, the service goes on with."""
    for server in servers:
        try:
            if server.look():
                log.error("server_died", name=type(server).__name__)
        except subprocess.SubprocessError as error:
            log.warning("server_not_started", name=type(server).__name__, error=str(error))


def _how_to_make_a_key(settings: Settings, *, is_own: bool) -> str:
    where = f" --data-dir {settings.data_dir}" if is_own or settings.database_url is None else ""
    return (
        f"Serving on {settings.host} needs an API key, and there is none yet. Make one first: "
        f"winnow keys create{where}. Or serve this machine alone, without keys: "
        "winnow serve --host 127.0.0.1"
    )


@contextmanager
def _stop_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on the first signal; the second one means it."""

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Member:
    """A child process that is started again when it dies."""

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        environment: Mapping[str, str],
        keep_files: tuple[int, ...] = (),
        grace_seconds: float,
    ) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._keep_files = keep_files
        self._grace_seconds = grace_seconds
        self._backoff = FIRST_BACKOFF_SECONDS
        self._start_again_at: float | None = None
        self._start()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._start_again_at = None
        self._process = start_child(
            self._command,
            death_signal=signal.SIGTERM,
            environment=self._environment,
            keep_files=self._keep_files,
        )

    def exit_code(self) -> int | None:
        """Return how the process ended, or None while it runs."""
        return self._process.poll()

    def look(self) -> None:
        """Start the process again when it died, after a pause that grows with every death."""
        now = time.monotonic()
        if self._start_again_at is not None:
            if now >= self._start_again_at:
                self._start()
            return
        code = self._process.poll()
        if code is None:
            return
        self._kill_group()
        if now - self._started_at > STEADY_SECONDS:
            self._backoff = FIRST_BACKOFF_SECONDS
        log.error("process_died", name=self.name, exit_code=code, again_in_seconds=self._backoff)
        self._start_again_at = now + self._backoff
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF_SECONDS)

    def ask_to_stop(self) -> None:
        """Send SIGTERM, if it runs."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Wait for the end as long as the grace lasts, then kill what is left of its group."""
        try:
            self._process.wait(self._grace_seconds)
        except subprocess.TimeoutExpired:
            log.warning("process_killed", name=self.name)
        finally:
            self._kill_group()
            self._process.wait()

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


@contextmanager
def _crew(
    settings: Settings, listener: socket.socket, num_workers: int | None
) -> Iterator[list[_Member]]:
    """Run the API and the workers; stop the API first, so that nobody is let in any more."""
    environment = _environment(settings)
    python = [sys.executable, "-P", "-m"]
    crew: list[_Member] = []
    try:
        crew.append(
            _Member(
                "api",
                [*python, "app.server", str(listener.fileno())],
                environment=environment,
                keep_files=(listener.fileno(),),
                grace_seconds=API_GRACE_SECONDS,
            )
        )
        for place, gpu in enumerate(_gpus_of_workers(settings, num_workers)):
            crew.append(
                _Member(
                    f"worker-{place}",
                    [*python, "app", "worker"],
                    environment=environment
                    if gpu is None
                    else {**environment, "CUDA_VISIBLE_DEVICES": gpu},
                    grace_seconds=WORKER_GRACE_SECONDS,
                )
            )
        yield crew
    finally:
        if sys.stderr.isatty():
            print("Stopping…", file=sys.stderr, flush=True)  # noqa: T201  a person waits for it
        api, workers = crew[:1], crew[1:]
        for group in (api, workers):
            for member in group:
                member.ask_to_stop()
            for member in group:
                member.stop()


def _environment(settings: Settings) -> dict[str, str]:
    """Return what the children's own Settings must read."""
    return {
        **os.environ,
        "WINNOW_DATABASE_URL": settings.require_database_url(),
        "WINNOW_BROKER_URL": settings.require_broker_url(),
        "WINNOW_DATA_DIR": str(settings.data_dir),
        "WINNOW_REQUIRE_KEYS": str(settings.require_keys),
        "WINNOW_LOG_FORMAT": settings.log_format,
    }


def _gpus_of_workers(settings: Settings, num_workers: int | None) -> list[str | None]:
    """Return the GPU of each worker, None for no choice: they are dealt out in turn."""
    gpus: list[str | None] = [] if settings.device == "cpu" else [*_visible_gpus()]
    count = num_workers if num_workers is not None else max(1, len(gpus))
    return [gpus[place % len(gpus)] if gpus else None for place in range(count)]


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    listed = subprocess.run(  # noqa: S603  the query is ours
        query, capture_output=True, text=True, check=False, timeout=30
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def _wait_for_api(api: _Member, listener: socket.socket, stop: threading.Event) -> None:
    """Return when the API answers, or when the service is to stop.

    Raises:
        RefusedToStart: it ended, or did not answer in time.
    """
    host, port = _address(listener)
    give_up_at = time.monotonic() + START_SECONDS
    while not stop.wait(LOOK_SECONDS):
        connection = http.client.HTTPConnection(host, port, timeout=1)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException):
            pass  # it listens already, but nobody answers yet
        finally:
            connection.close()
        if api.exit_code() is not None or time.monotonic() > give_up_at:
            raise RefusedToStart("The API did not start; what it said stands above.")


def _address(listener: socket.socket) -> tuple[str, int]:
    """Return where this machine reaches the listener."""
    host, port, *_ = listener.getsockname()
    return ANY_ADDRESS.get(host, host), port


def _greet(settings: Settings, listener: socket.socket) -> None:
    host, port = _address(listener)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    keys = "with API keys" if settings.require_keys else "without API keys, for this machine only"
    print(  # noqa: T201  the one line that a person waits for
        f"Winnow is ready at {url} ({keys}). Try {url}/docs. Data: {settings.data_dir}. "
        "Ctrl-C stops it.",
        flush=True,
    )
