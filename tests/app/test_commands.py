"""The service's verbs: `winnow serve` as a person starts and stops it, and keys."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from sqlalchemy import Engine
from typer import Typer
from typer.testing import CliRunner

from app import supervisor
from app.child import start_child
from app.commands import register
from app.embedded import EmbeddedServers
from app.jobs import CPU_QUEUE_NAME, FETCH_QUEUE_NAME, QUEUE_NAME
from app.settings import Settings, get_settings

WINNOW = [sys.executable, "-P", "-m", "app"]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment without any setting of Winnow's but those given."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    return plain | {"WINNOW_RECONCILE_SECONDS": "1"} | changes


class Serving:
    """A `winnow serve` without workers, which are not what is tested here."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*WINNOW, "serve", "--port", "0", "--workers", "0", "--data-dir", str(data_dir)],
                stdout=log,
                stderr=log,
                env=environment(),
            )
        wait_for(lambda: "Winnow is ready" in self.log.read_text(), self.log)
        self.port = int(self.log.read_text().partition("http://127.0.0.1:")[2].partition(" ")[0])

    def get(self, path: str) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def api(self) -> psutil.Process:
        return next(child for child in self.children() if "app.server" in child.cmdline())

    def broker(self) -> psutil.Process:
        return next(child for child in self.children() if "valkey" in child.name())

    def postgres(self) -> int:
        return int((self.data_dir / "postgres" / "postmaster.pid").read_text().split()[0])


def wait_for(is_there: Callable[[], bool], log: Path | None = None) -> None:
    give_up_at = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < give_up_at, log.read_text() if log else "not in time"
        time.sleep(0.05)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], Serving]]:
    """Starts services on one data directory, and leaves none behind."""
    started: list[Serving] = []

    def start() -> Serving:
        started.append(Serving(tmp_path / "data"))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGINT)
            service.process.wait(30)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


class TestServe:
    def test_it_starts_with_one_line_and_stops_whole_on_ctrl_c(
        self, serve: Callable[[], Serving]
    ) -> None:
        service = serve()
        status, body = service.get("/readyz")
        assert status == 503
        broken = [name for name, check in body["checks"].items() if not check["ok"]]
        assert broken == ["worker"]
        assert service.get("/v1/audits")[0] == 200  # without a key
        children, postgres = service.children(), psutil.Process(service.postgres())

        service.process.send_signal(signal.SIGINT)

        assert service.process.wait(30) == 0
        assert all(is_gone(process) for process in (*children, postgres))
        assert "Traceback" not in service.log.read_text()

    def test_an_api_that_dies_is_started_again_on_the_same_port(
        self, serve: Callable[[], Serving]
    ) -> None:
        service = serve()
        api = service.api()
        api.kill()
        wait_for(lambda: is_gone(api))
        assert service.get("/healthz")[0] == 200  # the socket is the parent's: callers just wait
        assert '"event": "process_died"' in service.log.read_text()

    def test_servers_that_die_are_started_again(self, serve: Callable[[], Serving]) -> None:
        """The broker comes back empty, and the database as it was."""
        service = serve()
        body = {"url": "https://example.com/"}
        made = httpx2.post(f"http://127.0.0.1:{service.port}/v1/webhooks", json=body)
        assert made.status_code == 201
        postgres, broker = psutil.Process(service.postgres()), service.broker()
        postgres.kill()
        broker.kill()
        wait_for(lambda: is_gone(postgres) and is_gone(broker))

        def are_back() -> bool:
            checks = service.get("/readyz")[1]["checks"]
            return bool(checks["database"]["ok"] and checks["broker"]["ok"])

        wait_for(are_back, service.log)
        webhooks = service.get("/v1/webhooks")[1]["data"]
        assert [webhook["id"] for webhook in webhooks] == [made.json()["id"]]
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(30) == 0
        assert "Traceback" not in service.log.read_text()

    def test_killed_it_takes_its_children_along_and_starts_again(
        self, serve: Callable[[], Serving]
    ) -> None:
        service = serve()
        children = service.children()
        assert len(children) == 2  # API and broker
        service.process.kill()
        service.process.wait()
        wait_for(lambda: all(is_gone(child) for child in children))
        again = serve()
        assert again.get("/healthz")[0] == 200
        postgres = psutil.Process(again.postgres())
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(30) == 0
        assert is_gone(postgres)

    def test_a_second_one_on_the_same_folder_is_refused(self, serve: Callable[[], Serving]) -> None:
        service = serve()
        done = winnow("serve", "--port", "0", "--workers", "0", data_dir=service.data_dir)
        assert done.returncode == 1
        assert "--data-dir" in done.stderr
        done = winnow("serve", "--port", str(service.port), data_dir=service.data_dir)
        assert "Choose another address with --host and --port" in done.stderr
        assert service.get("/healthz")[0] == 200

    def test_an_address_that_others_reach_needs_a_key_first(self, tmp_path: Path) -> None:
        options = ("serve", "--host", "0.0.0.0", "--port", "0", "--workers", "0")
        done = winnow(*options, data_dir=tmp_path / "data")
        assert done.returncode == 1
        assert f"winnow keys create --data-dir {tmp_path / 'data'}" in done.stderr
        assert "Traceback" not in done.stderr

    def test_keys_are_made_while_it_runs_and_without_stopping_it(
        self, serve: Callable[[], Serving]
    ) -> None:
        service = serve()
        made = winnow("keys", "create", "--name", "ci", data_dir=service.data_dir)
        assert made.stdout.startswith("wnw_")
        assert "ci" in winnow("keys", "list", data_dir=service.data_dir).stdout
        assert service.get("/v1/audits")[0] == 200


def winnow(*arguments: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    return subprocess.run(
        [*WINNOW, *arguments, "--data-dir", str(data_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(),
    )


class TestVerbs:
    @pytest.fixture
    def run(
        self, engine: Engine, servers: EmbeddedServers, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., Any]]:
        app = Typer()
        register(app)
        for name in [name for name in os.environ if name.startswith("WINNOW_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("WINNOW_DATABASE_URL", servers.database_url)
        get_settings.cache_clear()
        yield lambda *arguments: CliRunner().invoke(app, arguments)
        get_settings.cache_clear()

    def test_the_life_of_a_key(self, run: Callable[..., Any]) -> None:
        assert run("migrate").exit_code == 0
        made = run("keys", "create", "--tenant", "acme", "--days", "7")
        key_id = made.stderr.split()[0]
        assert made.stdout.startswith("wnw_")
        listed = run("keys", "list").stdout
        assert key_id in listed
        assert made.stdout.strip() not in listed
        assert run("keys", "revoke", key_id).exit_code == 0
        assert "revoked" in run("keys", "list").stdout
        unknown = run("keys", "revoke", "key_nope")
        assert unknown.exit_code == 1
        assert "winnow keys list" in unknown.stderr

    def test_every_verb_that_answers_does_so_in_json_too(self, run: Callable[..., Any]) -> None:
        def answer(*words: str) -> Any:
            return json.loads(run(*words, "--json").stdout)

        assert answer("migrate") == {"migrated": True}
        made = answer("keys", "create", "--tenant", "acme")
        assert made["secret"].startswith("wnw_")
        (listed,) = answer("keys", "list")
        assert (listed["id"], listed["tenant"]) == (made["id"], "acme")
        assert "secret" not in listed
        assert answer("keys", "revoke", made["id"]) == {"id": made["id"], "revoked": True}

    def test_what_is_missing_is_said_in_one_sentence(
        self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WINNOW_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
        get_settings.cache_clear()
        assert "cannot be reached" in run("migrate").stderr
        monkeypatch.delenv("WINNOW_DATABASE_URL")
        get_settings.cache_clear()
        assert "WINNOW_DATABASE_URL is not set" in run("migrate").stderr
        monkeypatch.setenv("WINNOW_PORT", "high")
        get_settings.cache_clear()
        assert "WINNOW_PORT: Input should be" in run("migrate").stderr


class TestGpus:
    @pytest.mark.parametrize(
        ("visible", "num_workers", "dealt"),
        [
            ("0,1", None, ["0", "1"]),
            ("", None, [None]),
            ("0,1", 3, ["0", "1", "0"]),
            ("GPU-a", 1, ["GPU-a"]),
            ("0", 0, []),
        ],
    )
    def test_workers_get_one_each(
        self,
        monkeypatch: pytest.MonkeyPatch,
        visible: str,
        num_workers: int | None,
        dealt: list[str | None],
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert supervisor._gpus_of_workers(Settings(), num_workers) == dealt
        on_cpu = supervisor._gpus_of_workers(Settings(device="cpu"), 1)
        assert on_cpu == [None]


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """However the parent dies: here by kill -9."""
    program = (
        "import signal, sys, time; from app.child import start_child;"
        "child = start_child([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " death_signal=signal.SIGKILL); print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        wait_for(lambda: "time.sleep(600)" in " ".join(child.cmdline()))
        time.sleep(0.2)
        parent.kill()
    wait_for(lambda: is_gone(child))


def test_a_child_prints_where_it_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        child = start_child(
            ["/bin/sh", "-c", "echo $GREETING"],
            death_signal=signal.SIGTERM,
            environment=environment(GREETING="hello"),
            log_file=file.fileno(),
        )
        assert child.wait(10) == 0
    assert log.read_text() == "hello\n"


class TestWorkersChoice:
    """What a worker takes."""

    @pytest.mark.parametrize(
        ("options", "queues"),
        [
            ((), [QUEUE_NAME, CPU_QUEUE_NAME, FETCH_QUEUE_NAME]),
            (("--cpu",), [CPU_QUEUE_NAME]),
            (("--gpu",), [QUEUE_NAME, FETCH_QUEUE_NAME]),
            (("--fetch",), [FETCH_QUEUE_NAME]),
            (("--gpu", "--offline"), [QUEUE_NAME]),
            (("--offline",), [QUEUE_NAME, CPU_QUEUE_NAME]),
        ],
    )
    def test_it_is_all_work_unless_it_is_told_otherwise(
        self, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], queues: list[str]
    ) -> None:
        taken: list[list[str]] = []

        def run_worker(chosen: list[str]) -> int:
            taken.append(chosen)
            return 0

        monkeypatch.setattr("workers.celery_app.run_worker", run_worker)
        app = Typer()
        register(app)
        result = CliRunner().invoke(app, ["worker", *options])
        assert (result.exit_code, taken) == (0, [queues])

    @pytest.mark.parametrize(
        "options", [("--cpu", "--gpu"), ("--fetch", "--gpu"), ("--fetch", "--offline")]
    )
    def test_it_cannot_leave_everything(self, options: tuple[str, ...]) -> None:
        app = Typer()
        register(app)
        result = CliRunner().invoke(app, ["worker", *options])
        assert result.exit_code == 2
        assert "none of them" in " ".join(result.output.replace("│", " ").split())
