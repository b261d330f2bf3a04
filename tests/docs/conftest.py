"""One service for all pages: the one that the tutorial starts, on a port of the tests."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks_of
from tests.docs.running import Reader, environment

START_SECONDS, STOP_SECONDS = 120, 60


@dataclass(frozen=True)
class Place:
    """Where the pages are read.

    Attributes:
        folder: the service was started here, so it may read every file below.
        address: host and port of the service.
    """

    folder: Path
    address: str

    def reader(self, name: str) -> Reader:
        """Return a reader in a folder of their own, with the files that examples/ writes."""
        folder = self.folder / name.replace("/", "-").removesuffix(".md")
        shutil.copytree(self.folder / "tickets", folder / "tickets", copy_function=_copy)
        (folder / "examples").symlink_to(ROOT / "examples")
        return Reader(folder, self.address)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A running service; it is stopped as Ctrl-C does, by the code that started it."""
    folder = tmp_path_factory.mktemp("docs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    (block,) = [block for block in blocks_of("docs/tutorial.md") if "service" in block.marks]
    surroundings = environment(address, WINNOW_PORT=str(port), OMP_NUM_THREADS="1")
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen(
            ["bash", "-c", f"exec env {block.code}"],  # its settings, and no shell in between
            cwd=folder,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        subprocess.run(
            ["python", ROOT / "examples" / "tickets.py"], cwd=folder, env=surroundings, check=True
        )
        _wait_until_ready(service, address, folder / "service.log")
        yield Place(folder, address)
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(STOP_SECONDS)


def _copy(source: str, target: str) -> None:
    """Copy a file; a model's weights, which nobody changes, are linked."""
    (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)


def _wait_until_ready(service: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert service.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://{address}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"not ready in {START_SECONDS} s:\n{log.read_text()[-3000:]}")
