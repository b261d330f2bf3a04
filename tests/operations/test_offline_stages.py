"""What a GPU worker without a network needs: all stages after the first open no connection."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.audits.models import Audit
from app.work.models import Stage
from tests.factories import make_ranking
from tests.hub import LoopbackHub, files_below, loopback_hub
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace, results
from workers.pipeline import runtime

DATA = "hf://datasets/lab/films@main?split="
_opened: list[tuple[Any, ...]] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what would leave the machine; the servers of the tests are on unix sockets."""
    if not _watching or event not in {"socket.connect", "socket.getaddrinfo", "socket.sendto"}:
        return
    if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
        return
    _opened.append((event, *arguments[1:]))
    raise OSError(101, "Network is unreachable")


sys.addaudithook(_watch)  # it cannot be taken away again, so it looks whether it is asked to


@contextmanager
def no_network() -> Iterator[list[tuple[Any, ...]]]:
    """Refuse every connection of this process and yield what was tried."""
    _opened.clear()
    _watching.append(True)
    try:
        yield _opened
    finally:
        _watching.clear()


@pytest.fixture
def hub(workplace: Workplace, models: Models) -> Iterator[LoopbackHub]:
    """A hub with a base model and three splits, which is gone when the fetching is over."""
    with loopback_hub() as server:
        server.push("models", "lab/encoder", files_below(models.encoder))
        splits = {"train": (60, 0), "validation": (12, 1), "test": (25, 2)}
        server.push(
            "datasets",
            "lab/films",
            {
                f"{name}.parquet": tiny.write_table(
                    workplace.files / f"{name}.parquet", tiny.reviews(size, seed=seed)
                ).read_bytes()
                for name, (size, seed) in splits.items()
            },
        )
        yield server


def submit(workplace: Workplace, models: Models, *parts: str, **request: Any) -> str:
    """Submit an audit of what the hub has."""
    named: dict[str, Any] = {
        name: {"reference": DATA + name} for name in ("train", "validation", *parts)
    }
    return workplace.submit(
        models.encoder,
        source={"reference": "hf://lab/encoder@main"},
        fine_tune={"epochs": 2, "learning_rate": 1e-2, "batch_size": 8},
        **named,
        **request,
    )


def fetch(workplace: Workplace, audit_id: str) -> None:
    claim = workplace.claim(audit_id)
    assert claim is not None
    assert claim.stage is Stage.PREPARE
    workplace.execute(claim)
    runtime._loaded.clear()  # what goes on is another process


def test_nothing_after_the_first_stage_opens_a_connection(
    workplace: Workplace, models: Models, hub: LoopbackHub
) -> None:
    """An audit that goes through every stage there is, and a ranking after it."""
    service = workplace.with_settings(hub_endpoint=hub.endpoint)
    audit_id = submit(
        service,
        models,
        "test",
        plant_noise={"fraction": 0.2},
        estimators=["grad_cosine", "datainf", "ekfac", "tracin"],
        ranking={"estimator": "auto", "layers": "auto", "aggregation": "auto"},
        verify={"seeds": [0]},
    )
    fetch(service, audit_id)
    asked = len(hub.requests)
    with no_network() as opened:
        audit = service.succeed(audit_id)
        stages = {unit.stage for unit in service.units(audit_id)}
        ranking = make_ranking(service.engine, audit, aggregation="vote")
        service.finish(audit_id)
    assert opened == []
    assert len(hub.requests) == asked
    assert stages == {*Stage} - {Stage.RANK}
    assert {unit.state for unit in service.units(audit_id)} == {"done"}
    assert ranking.id


def test_the_guard_sees_a_connection(workplace: Workplace, models: Models) -> None:
    """The first stage tries to reach its hub, and is told that there is no network."""
    service = workplace.with_settings(hub_endpoint="http://127.0.0.1:1", max_attempts=1)
    with no_network() as opened:
        audit = service.finish(submit(service, models))
    assert opened
    assert audit.error_code == "hub_unreachable"


def test_a_data_directory_that_was_moved_is_as_good(
    workplace: Workplace, models: Models, hub: LoopbackHub
) -> None:
    """Halfway through, with a model that only the directory itself still has."""
    service = workplace.with_settings(hub_endpoint=hub.endpoint)
    ends: list[Audit] = []
    for place in ("data", "moved"):
        audit_id = submit(service, models)
        fetch(service, audit_id)
        moved = service.settings.data_dir.with_name(place)
        service.settings.data_dir.rename(moved)
        service = service.with_settings(data_dir=moved)
        runtime._loaded.clear()
        ends.append(service.succeed(audit_id))
    assert results(ends[0]) == results(ends[1])
