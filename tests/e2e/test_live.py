"""What people and pipelines follow a service by: events, long polling, webhooks."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.work.models import Stage
from tests.e2e.conftest import MODEL, Service
from tests.live.sse import Event, read_events
from tests.webhooks.receiver import Receiver, receiving

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("service"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of this module, whose webhooks may call this machine."""
    folder = tmp_path_factory.mktemp("live")
    environment = {
        "WINNOW_FILE_ROOTS": f"{MODEL}:{folder}",
        "WINNOW_WEBHOOK_PLAIN_HTTP": "true",
        "WINNOW_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "WINNOW_WEBHOOK_RETRY_SECONDS": "0.1",
    }
    running = Service(folder / "data", environment, folder / "service.log")
    running.start()
    yield running
    assert running.stop() == 0, running.tail()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def webhook(service: Service, receiver: Receiver) -> Iterator[dict[str, Any]]:
    answer = service.http.post("/v1/webhooks", json={"url": receiver.url})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    yield made
    service.http.delete(made["links"]["self"])


def log_of(service: Service, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    page = service.http.get(webhook["links"]["deliveries"]).json()
    deliveries: list[dict[str, Any]] = page["data"]
    return deliveries


def api_process(service: Service) -> psutil.Process:
    assert service.process is not None
    children = psutil.Process(service.process.pid).children(recursive=True)
    (api,) = [child for child in children if "app.server" in child.cmdline()]
    return api


def test_a_whole_audit_is_followed_to_its_end(
    service: Service,
    request_body: dict[str, Any],
    receiver: Receiver,
    webhook: dict[str, Any],
) -> None:
    """Events rise to the end; the signed message of it survives a receiver in trouble."""
    receiver.statuses = [500, 500, 200]
    audit_id = service.submit(**request_body)
    events: list[Event] = []
    with service.http.stream("GET", f"/v1/audits/{audit_id}/events", timeout=120) as response:
        events += read_events(response.iter_lines())
    assert [event.name for event in events] == ["progress"] * (len(events) - 1) + ["done"]
    assert events[-1].data["state"] == "succeeded"
    progress = [event.data["progress"] for event in events]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    assert len(set(progress)) >= 5
    ids = [int(event.id) for event in events]
    assert ids == sorted(set(ids))
    stages = [event.data["stage"] for event in events if event.data["stage"]]
    assert stages == sorted(stages, key=list(Stage).index)  # a short one may pass unseen
    assert {"fine_tune", "gradients"} <= set(stages)
    assert any(event.data["samples_per_second"] for event in events)
    assert any(event.data["eta_seconds"] for event in events)

    received = receiver.wait_for(3)
    assert len({each.id for each in received}) == 1
    message = received[-1].verify(webhook["secret"])
    assert (message["type"], message["data"]["id"]) == ("audit.succeeded", audit_id)
    suspects = service.http.get(message["data"]["links"]["suspects"])
    assert suspects.status_code == 200
    service.wait_for(lambda: log_of(service, webhook)[0]["state"] == "succeeded", seconds=20)
    (delivery,) = log_of(service, webhook)
    assert delivery["id"] == received[0].id
    assert [entry["status_code"] for entry in delivery["history"]] == [500, 500, 200]


def test_a_message_outlives_the_api_that_owes_it(
    service: Service,
    request_body: dict[str, Any],
    receiver: Receiver,
    webhook: dict[str, Any],
) -> None:
    """The API is frozen while a worker ends the audit, then killed; the next one sends."""
    audit_id = service.submit(**request_body)
    service.reach(audit_id, "fine_tune")
    api = api_process(service)
    api.suspend()
    results = service.data_dir / "audits" / audit_id / "results"
    service.wait_for(lambda: has_file(results, "suspects.jsonl"), seconds=120)
    time.sleep(2)  # the rows follow the files
    assert receiver.received == []
    os.kill(api.pid, signal.SIGKILL)
    (received,) = receiver.wait_for(1, seconds=60)
    message = received.verify(webhook["secret"])
    assert (message["type"], message["data"]["id"]) == ("audit.succeeded", audit_id)
    service.wait_for(service._is_ready, seconds=60)
    assert service.audit(audit_id)["state"] == "succeeded"


def has_file(folder: Path, name: str) -> bool:
    return any(folder.glob(f"*/{name}"))


def test_ctrl_c_ends_open_streams_and_waiting_calls_at_once(
    service: Service, request_body: dict[str, Any]
) -> None:
    audit_id = service.submit(**{**request_body, "fine_tune": {"epochs": 50}})
    service.reach(audit_id, "fine_tune")
    listening = threading.Barrier(6)

    def listen() -> None:
        with service.http.stream("GET", f"/v1/audits/{audit_id}/events", timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            listening.wait()
            with contextlib.suppress(OSError):
                list(lines)

    listeners = [threading.Thread(target=listen) for _ in range(5)]
    for listener in listeners:
        listener.start()
    listening.wait(30)
    api = api_process(service)
    started = time.monotonic()
    assert service.process is not None
    service.process.send_signal(signal.SIGINT)
    assert api.wait(20) in {0, None}
    assert time.monotonic() - started < 4  # the grace that uvicorn gives would be 5 seconds more
    for listener in listeners:
        listener.join(20)
        assert not listener.is_alive()
    assert service.process.wait(60) == 0, service.tail()
    assert "process_killed" not in service.log.read_text()
    service.start()
