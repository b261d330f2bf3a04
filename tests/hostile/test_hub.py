"""The hub sends on to its storage: only where that is public, or allowed by the operator."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.datasets.files import DatasetLimits
from app.references import HubDatasetReference
from tests.hostile.conftest import FileServer, no_upload
from tests.hostile.names import NameServer
from tests.hub import LoopbackHub, loopback_hub
from tests.webhooks.conftest import networks
from workers.sources.datasets import resolve_dataset
from workers.sources.errors import SourceError
from workers.sources.hub import Hub
from workers.sources.local import ResolvedDataset

TABLE = b"text,label\ngood,a\nbad,b\n"
Resolve = Callable[..., ResolvedDataset]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as running:
        running.push("datasets", "lab/films", {"train.csv": TABLE})
        yield running


@pytest.fixture
def storage(serve: Callable[..., FileServer]) -> FileServer:
    server = serve(tls=False)
    key = hashlib.sha1(TABLE, usedforsecurity=False).hexdigest()
    server.answers[f"/{key}"] = (200, {"Content-Length": str(len(TABLE))}, TABLE)
    return server


@pytest.fixture
def resolve(hub: LoopbackHub, tmp_path: Path) -> Resolve:
    def resolve(allowed: str = "") -> ResolvedDataset:
        return resolve_dataset(
            HubDatasetReference("lab/films"),
            find_upload=no_upload,
            roots=[],
            hub=Hub(
                endpoint=hub.endpoint,
                cache_dir=tmp_path / "hub",
                networks=networks(allowed) if allowed else (),
            ),
            cache_dir=tmp_path / "cache",
            limits=DatasetLimits(),
            max_bytes=10_000,
        )

    return resolve


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_to_an_address_inside_it_is_not_followed(
    resolve: Resolve, hub: LoopbackHub, storage: FileServer, host: str
) -> None:
    """The hub itself is where the operator says; what it sends on to is not the operator's."""
    hub.sends_on_to = f"http://{host}:{storage.port}"
    with pytest.raises(SourceError, match="the hub sends on") as caught:
        resolve()
    assert caught.value.code == "not_permitted"
    assert not caught.value.transient
    assert storage.asked == []


def test_to_a_name_of_an_address_inside_it_is_not_followed(
    resolve: Resolve, hub: LoopbackHub, storage: FileServer, names: NameServer
) -> None:
    names.say("inside.test", ["127.0.0.1"])
    hub.sends_on_to = f"http://inside.test:{storage.port}"
    with pytest.raises(SourceError, match="WINNOW_FETCH_NETWORKS"):
        resolve()
    assert names.questions == ["inside.test"]
    assert storage.asked == []


def test_to_an_allowed_network_it_is_followed(
    resolve: Resolve, hub: LoopbackHub, storage: FileServer
) -> None:
    hub.sends_on_to = f"http://127.0.0.1:{storage.port}"
    assert resolve("127.0.0.0/8").format == "parquet"
    assert len(storage.asked) == 1


def test_the_hub_itself_may_be_in_house(resolve: Resolve, storage: FileServer) -> None:
    assert resolve().format == "parquet"
    assert storage.asked == []
