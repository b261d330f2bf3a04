"""The pages on a real server, and a real browser where there is one."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvicorn
from celery import Celery
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from sqlalchemy import Engine

from app.main import create_app
from app.settings import Settings
from tests.app.conftest import api, client, new_client  # noqa: F401  fixtures

NO_BROWSER = (
    "no chromium is installed: apt-get install --no-install-recommends chromium, or make CHROMIUM "
    "name one"
)


@pytest.fixture
def site(settings: Settings, engine: Engine, celery: Celery) -> Iterator[str]:
    """The address of a server that asks for no keys, as `winnow serve` starts it."""
    yield from served(settings.model_copy(update={"require_keys": False}), engine, celery)


@pytest.fixture
def locked_site(settings: Settings, engine: Engine, celery: Celery) -> Iterator[str]:
    """The address of a server that asks for keys."""
    yield from served(settings, engine, celery)


def served(settings: Settings, engine: Engine, celery: Celery) -> Iterator[str]:
    """Serve the application on a free port of this machine until the caller is done."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(settings, engine, celery), log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def chromium() -> str | None:
    """Return where Debian's chromium is."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser; where none is installed the test is skipped, or fails in CI."""
    path = chromium()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(NO_BROWSER)
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=path, args=["--headless", "--no-sandbox"]
        )
        yield launched
        launched.close()


@dataclass
class Watched:
    """A page, and what its console and its scripts complained of."""

    page: Page
    complaints: list[str]


def watched(context: BrowserContext) -> Watched:
    """Open a page and listen to it."""
    watched = Watched(context.new_page(), [])
    watched.page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    watched.page.on(
        "console",
        lambda message: (
            watched.complaints.append(message.text) if message.type == "error" else None
        ),
    )
    watched.page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)  # a busy machine is slow, and no page is timed here
    return watched


@pytest.fixture
def tab(browser: Browser) -> Iterator[Watched]:
    """A tab of a fresh browser profile, whose console must stay silent."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield watched(context)
