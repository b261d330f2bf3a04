"""A cluster that the tests break, and what it computes when nobody does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster, running
from tests.chaos.programme import Outcome, Programme, write_files
from tests.webhooks.receiver import Receiver, receiving

DEFAULT_FAULTS = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-faults", type=int, default=DEFAULT_FAULTS, help="how many faults are injected"
    )
    parser.addoption("--chaos-seed", type=int, default=0, help="decides their order")


@dataclass(frozen=True)
class Site:
    """The cluster, who is told of ends, and the quiet run."""

    cluster: Cluster
    receiver: Receiver
    quiet: Outcome


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the tables that all audits here are of."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="session")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, files: Path
) -> Iterator[Site]:
    """The parts of a service, after one quiet run."""
    folder = tmp_path_factory.mktemp("chaos")
    seed = request.config.getoption("--chaos-seed", default=0)
    with (
        receiving() as receiver,
        running(folder, data_dir=folder / "data", files=files, seed=seed) as cluster,
    ):
        cluster.http.post("/v1/webhooks", json={"url": receiver.url}).raise_for_status()
        programme = Programme(cluster)
        programme.begin()
        yield Site(cluster, receiver, programme.end())
