"""Small services whose every answer the test decides, on loopback."""

import logging
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvicorn
from celery import Celery
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from typer.testing import CliRunner, Result
from winnow import Client, connection
from winnow.cli import make_app
from winnow.commands import findings

from app.keys.service import create_key
from app.main import create_app
from app.settings import Settings


class ScriptedService:
    """Answers one call after the other as it was told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.bodies: list[bytes] = []
        self.url = ""
        self._answers: list[Response] = []

    def answers(self, *answers: Response) -> None:
        """Give these answers next; the last one stands for all that follow."""
        self._answers = list(answers)

    async def handle(self, request: Request) -> Response:
        self.requests.append(request)
        self.bodies.append(await request.body())
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@contextmanager
def serving(app: ASGIApp, **options: Any) -> Iterator[str]:
    """Serve an application on loopback, in a thread; yield its address."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", **options
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    scripted = ScriptedService()
    app = Starlette(routes=[Route("/{path:path}", scripted.handle, methods=["GET", "POST"])])
    with serving(app) as url:
        scripted.url = url
        yield scripted


class ForgetfulService(socketserver.ThreadingTCPServer):
    """Reads every request to its end and hangs up without an answer."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HangUp)
        self.received: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _HangUp(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, ForgetfulService)
        self.request.settimeout(0.2)  # a pause of the client's means that it waits for the answer
        received = b""
        with suppress(TimeoutError):
            while piece := self.request.recv(65536):
                received += piece
        self.server.received.append(received)


@pytest.fixture
def forgetful() -> Iterator[ForgetfulService]:
    with ForgetfulService() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def url(settings: Settings, engine: Engine, celery: Celery) -> Iterator[str]:
    """The real application on the real servers."""
    with serving(create_app(settings, engine, celery)) as address:
        yield address


@pytest.fixture
def api_key(engine: Engine) -> str:
    return create_key(engine, tenant="default", name="test", valid_days=1).secret


@pytest.fixture
def client(url: str, api_key: str) -> Iterator[Client]:
    with Client(url, api_key, attempts=2) as client:
        yield client


Winnow = Callable[..., Result]


@pytest.fixture
def winnow(url: str, api_key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Winnow]:
    """Runs the command against the real application; only the service is asked by its doctor."""
    monkeypatch.setattr(findings, "_checks", {})
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.001)
    environment = {"WINNOW_URL": url, "WINNOW_API_KEY": api_key, "COLUMNS": "120"}

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(
            make_app(), [str(argument) for argument in arguments], env=environment
        )

    # The service's log would be printed among the command's answers: it runs in this process.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield run
    structlog.reset_defaults()
