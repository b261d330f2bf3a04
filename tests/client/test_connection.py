"""How the client behaves when the service is busy, broken, absent or another one."""

import socket
import time
import warnings
from pathlib import Path

import pytest
from starlette.responses import HTMLResponse, Response
from winnow import Client, KeyExpiresSoon, NotDoneInTime, ServiceUnreachable, WinnowError

from tests.client.answers import audit, problem
from tests.client.conftest import ForgetfulService, ScriptedService


def test_a_busy_service_is_asked_again(service: ScriptedService) -> None:
    service.answers(problem(503), problem(429, retry_after="0"), audit())
    with Client(service.url) as client:
        assert client.get("aud_1").state == "queued"
    assert len(service.requests) == 3


def test_the_pause_is_the_one_that_the_service_asks_for(service: ScriptedService) -> None:
    service.answers(problem(429, retry_after="0.7"), audit())
    started = time.monotonic()
    with Client(service.url) as client:
        client.get("aud_1")
    assert time.monotonic() - started >= 0.7


def test_a_service_that_stays_busy_raises_its_own_problem(service: ScriptedService) -> None:
    service.answers(problem(503, detail="The database cannot be reached."))
    with (
        Client(service.url, attempts=2) as client,
        pytest.raises(WinnowError, match=r"Not ready: The database cannot be reached\.") as caught,
    ):
        client.get("aud_1")
    assert caught.value.status == 503
    assert len(service.requests) == 2


def test_a_refusal_is_final_and_names_the_fields(service: ScriptedService) -> None:
    service.answers(
        problem(
            422,
            title="The request is not valid",
            type="urn:winnow:problem:invalid-request",
            detail="#/train/reference: no such upload",
            errors=[{"pointer": "#/train/reference", "detail": "no such upload"}],
        )
    )
    with Client(service.url) as client, pytest.raises(WinnowError) as caught:
        client.submit({})
    error = caught.value
    assert (error.title, error.status) == ("The request is not valid", 422)
    assert error.detail == "#/train/reference: no such upload"
    assert [(item.pointer, item.detail) for item in error.errors] == [
        ("#/train/reference", "no such upload")
    ]
    assert error.type == "urn:winnow:problem:invalid-request"
    assert error.request_id == "req_1"
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [200, 404, 502])
def test_something_that_is_not_winnow_is_told_apart(service: ScriptedService, status: int) -> None:
    """A proxy's or another program's page becomes one sentence, not a traceback of JSON."""
    service.answers(HTMLResponse("<h1>nginx</h1>", status))
    with (
        Client(service.url) as client,
        pytest.raises(WinnowError, match="did not answer as a Winnow service would") as caught,
    ):
        client.get("aud_1")
    assert caught.value.status == status


def test_nobody_listening_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}", attempts=2) as client,
        pytest.raises(ServiceUnreachable, match="Is the service running there"),
    ):
        client.get("aud_1")


def test_a_submit_whose_answer_was_lost_is_sent_again_under_the_same_key(
    forgetful: ForgetfulService,
) -> None:
    with Client(forgetful.url, attempts=2) as client, pytest.raises(ServiceUnreachable):
        client.submit({"model": {"reference": "file:///m"}})
    assert len(forgetful.received) == 2
    assert len(keys_of(forgetful)) == 1


def keys_of(forgetful: ForgetfulService) -> set[bytes]:
    return {
        line
        for request in forgetful.received
        for line in request.splitlines()
        if line.lower().startswith(b"idempotency-key:")
    }


def test_two_submits_have_two_keys(service: ScriptedService) -> None:
    service.answers(audit())
    with Client(service.url) as client:
        client.submit({})
        client.submit({})
        client.submit({}, idempotency_key="mine")
    keys = [request.headers["idempotency-key"] for request in service.requests]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_an_upload_whose_answer_was_lost_is_sent_again_under_the_same_key(
    forgetful: ForgetfulService,
) -> None:
    with Client(forgetful.url, attempts=2) as client, pytest.raises(ServiceUnreachable):
        client.upload_dataset(b"text,label\na,b\n", name="train.csv")
    assert len(forgetful.received) == 2
    assert len(keys_of(forgetful)) == 1


def test_an_upload_starts_anew_when_the_service_was_busy(
    service: ScriptedService, tmp_path: Path
) -> None:
    """The file is read from its beginning for every try."""
    path = tmp_path / "train.csv"
    path.write_bytes(b"text,label\ngood,1\nbad,0\n")
    service.answers(problem(503), problem(400, title="Enough seen"))
    with Client(service.url) as client, pytest.raises(WinnowError, match="Enough seen"):
        client.upload_dataset(path)
    first, second = service.bodies
    assert path.read_bytes() in first
    assert path.read_bytes() in second


def test_the_key_travels_as_a_bearer_token(service: ScriptedService) -> None:
    service.answers(audit())
    with Client(service.url, "wnw_secret") as client:
        client.get("aud_1")
    assert service.requests[0].headers["authorization"] == "Bearer wnw_secret"


def test_a_proxy_is_not_asked_for_the_machine_itself(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    service.answers(audit())
    with Client(service.url, attempts=1) as client:
        assert client.get("aud_1").id == "aud_1"


def test_an_id_stays_inside_its_path(service: ScriptedService) -> None:
    service.answers(audit())
    with Client(service.url) as client:
        client.get("../datasets?x=1")
    assert service.requests[0].scope["raw_path"] == b"/v1/audits/..%2Fdatasets%3Fx%3D1"


def test_waiting_reports_changes_only(service: ScriptedService) -> None:
    """The version that is known is named in If-None-Match; an unchanged audit is not reported."""
    service.answers(
        audit(),
        Response(status_code=304, headers={"etag": '"1"', "retry-after": "0"}),
        audit(etag='"2"', state="computing", progress=0.5),
        audit(etag='"3"', state="succeeded", done=True, progress=1.0),
    )
    seen: list[float] = []
    with Client(service.url) as client:
        done = client.wait(
            "aud_1", progress=lambda now: seen.append(now.progress), poll_seconds=0.01
        )
    assert done.state == "succeeded"
    assert seen == [0.0, 0.5, 1.0]
    assert [request.headers.get("if-none-match") for request in service.requests] == [
        None,
        '"1"',
        '"1"',
        '"2"',
    ]


def test_waiting_pauses_as_long_as_the_service_asks(service: ScriptedService) -> None:
    service.answers(audit(retry_after="0.6"), audit(state="failed", done=True))
    started = time.monotonic()
    with Client(service.url) as client:
        client.wait("aud_1")
    assert time.monotonic() - started >= 0.6


def test_patience_can_end_before_the_audit_does(service: ScriptedService) -> None:
    service.answers(audit())
    with Client(service.url) as client, pytest.raises(NotDoneInTime, match="aud_1"):
        client.wait("aud_1", poll_seconds=0.05, timeout=0.2)


def test_a_pause_longer_than_a_minute_is_left_to_the_caller(service: ScriptedService) -> None:
    """A quota of the day is not asked for again and again."""
    service.answers(problem(429, title="Quota used up", retry_after="3600"))
    with Client(service.url) as client, pytest.raises(WinnowError) as caught:
        client.get("aud_1")
    assert (caught.value.status, caught.value.retry_after) == (429, 3600)
    assert len(service.requests) == 1


def test_a_submit_that_was_too_early_is_sent_again_under_the_same_key(
    service: ScriptedService,
) -> None:
    service.answers(problem(429, retry_after="1"), audit())
    started = time.monotonic()
    with Client(service.url) as client:
        client.submit({})
    assert time.monotonic() - started >= 1
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 1


def test_a_key_that_soon_ends_is_warned_of_once(service: ScriptedService) -> None:
    answer = audit()
    answer.headers["Winnow-Key-Expires"] = "2026-12-01T00:00:00+00:00"
    service.answers(answer)
    with Client(service.url) as client:
        with pytest.warns(KeyExpiresSoon, match="ends at 2026-12-01") as warned:
            client.get("aud_1")
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            client.get("aud_1")
