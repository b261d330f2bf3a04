"""A cluster that the tests break, and what it computes when nobody does."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster, running
from tests.chaos.programme import Outcome, Programme, write_files
from tests.webhooks.receiver import Receiver, receiving

DEFAULT_FAULTS = 8
DISK_BYTES = 600 * 1024**2  # twice what must be free, and some


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-faults", type=int, default=DEFAULT_FAULTS, help="how many faults are injected"
    )
    parser.addoption("--chaos-seed", type=int, default=0, help="decides their order")


@dataclass(frozen=True)
class Site:
    """The cluster, who is told of ends, and the quiet run.

    Attributes:
        why_not_small: why its disk is not a small one that a test can fill; None if it is.
    """

    cluster: Cluster
    receiver: Receiver
    quiet: Outcome
    why_not_small: str | None


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the tables that all audits here are of."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """Put a small disk of its own under a folder; yield why not where that cannot be done."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        yield "there is no mount"
        return
    if done.returncode:
        yield f"a tmpfs cannot be mounted, which needs root: {done.stderr.strip()}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, files: Path
) -> Iterator[Site]:
    """The parts of a service, after one quiet run."""
    folder = tmp_path_factory.mktemp("chaos")
    data_dir = folder / "data"
    seed = request.config.getoption("--chaos-seed", default=0)
    with (
        receiving() as receiver,
        small_disk(data_dir) as why_not_small,
        running(folder, data_dir=data_dir, files=files, seed=seed) as cluster,
    ):
        cluster.http.post("/v1/webhooks", json={"url": receiver.url}).raise_for_status()
        programme = Programme(cluster)
        programme.begin()
        yield Site(cluster, receiver, programme.end(), why_not_small)
