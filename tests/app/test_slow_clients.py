"""Clients that keep a connection with next to nothing are cut off; others are not."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from celery import Celery
from fastapi import FastAPI
from sqlalchemy import Engine

from app.main import create_app
from app.settings import Settings
from app.slow_clients import PatientProtocol
from tests.client.conftest import serving
from tests.factories import make_audit, make_finished_audit

PATIENCE = 0.6
HOST = b"Host: localhost\r\n"


@pytest.fixture
def api(settings: Settings, engine: Engine, celery: Celery) -> FastAPI:
    changes = {
        "require_keys": False,
        "slow_client_seconds": PATIENCE,
        "min_body_rate": 1000,
        "max_concurrent_uploads": 2,
    }
    return create_app(settings.model_copy(update=changes), engine, celery)


@pytest.fixture
def port(api: FastAPI) -> Iterator[int]:
    with serving(api, http=PatientProtocol) as url:
        yield int(url.rpartition(":")[2])


class Wire:
    """A connection, byte by byte."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.began = time.monotonic()

    def send(self, *parts: bytes, pause: float = 0.0) -> None:
        for part in parts:
            self.socket.sendall(part)
            time.sleep(pause)

    def trickle(self, part: bytes, pause: float, seconds: float) -> bool:
        """Send a part again and again; return whether the other side hung up meanwhile."""
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at:
            try:
                self.socket.sendall(part)
            except OSError:
                return True
            time.sleep(pause)
        return False

    def rest(self) -> bytes:
        """Return all that comes until the other side hangs up."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of the answer behind which the connection ends."""
        head, _, body = self.rest().partition(b"\r\n\r\n")
        assert b"application/problem+json" in head.lower(), head
        return int(head.split()[1]), json.loads(body)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@contextmanager
def wire(port: int) -> Iterator[Wire]:
    connection = Wire(port)
    with closing(connection.socket):
        yield connection


def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    with wire(port) as silent:
        status, problem = silent.answer()
        assert (status, problem["type"]) == (408, "urn:winnow:problem:http-request-timeout")
        assert "WINNOW_SLOW_CLIENT_SECONDS" in problem["detail"]
        assert PATIENCE <= silent.seconds < 5


def test_a_head_that_trickles_is_not_waited_for(port: int) -> None:
    """Each byte would renew a timeout between bytes; this one is for the whole head."""
    with wire(port) as slow:
        slow.send(b"GET /healthz HTTP/1.1\r\n" + HOST)
        assert slow.trickle(b"X-A: b\r\n", pause=0.05, seconds=10)
        assert slow.seconds < 8


def test_the_second_head_of_a_connection_is_not_waited_for_either(port: int) -> None:
    with wire(port) as slow:
        slow.send(b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
        assert b"200 OK" in slow.socket.recv(65536)
        slow.send(b"GET /healthz HT")
        began = time.monotonic()
        assert b"408" in slow.rest()
        assert PATIENCE * 0.9 <= time.monotonic() - began < 5


def post(length: int, path: bytes = b"/v1/audits", kind: bytes = b"application/json") -> bytes:
    return (
        b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Type: " + kind + b"\r\n"
        b"Content-Length: " + str(length).encode() + b"\r\n\r\n"
    )


def test_a_body_that_stops_is_not_waited_for(port: int) -> None:
    with wire(port) as slow:
        slow.send(post(100), b'{"model"')
        status, problem = slow.answer()
        assert status == 408
        assert problem["type"] == "urn:winnow:problem:http-request-timeout"
        assert "WINNOW_MIN_BODY_RATE" in problem["detail"]
        assert slow.seconds < 5


def test_a_body_that_trickles_is_not_waited_for(port: int) -> None:
    with wire(port) as slow:
        slow.send(post(10_000))
        assert slow.trickle(b" ", pause=0.05, seconds=10)
        assert slow.seconds < 8


def test_an_upload_that_trickles_gives_its_place_back(port: int) -> None:
    """While it has it, a tenant's next upload is refused; then there is room again."""
    upload = post(100_000, b"/v1/datasets", b"multipart/form-data; boundary=x")
    with wire(port) as slow, wire(port) as refused:
        slow.send(upload, b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n')
        time.sleep(0.2)
        refused.send(post(3, b"/v1/datasets", b"multipart/form-data; boundary=x"), b"--x")
        status = int(refused.socket.recv(65536).split()[1])
        assert status == 429
        assert slow.answer()[0] == 408
    with wire(port) as later:
        later.send(post(3, b"/v1/datasets", b"multipart/form-data; boundary=x"), b"--x")
        assert int(later.socket.recv(65536).split()[1]) in {400, 422}


def test_a_steady_body_may_take_longer_than_the_patience(port: int) -> None:
    body = b'{"model": "' + b"x" * 3000 + b'"}'
    with wire(port) as steady:
        steady.send(post(len(body)))
        parts = [body[start : start + 250] for start in range(0, len(body), 250)]
        steady.send(*parts, pause=0.12)
        assert steady.seconds > 2 * PATIENCE
        assert int(steady.socket.recv(65536).split()[1]) == 422


def test_a_reader_who_takes_nothing_is_cut_off(
    port: int, engine: Engine, settings: Settings
) -> None:
    """The answer is larger than what the sockets hold, and nobody reads it."""
    audit = make_finished_audit(engine, settings)
    big = settings.data_dir / "audits" / audit.id / "results" / "suspects.csv"
    with big.open("ab") as file:
        file.write(b"x" * 30_000_000)
    with wire(port) as stuck:
        stuck.send(f"GET /v1/audits/{audit.id}/suspects.csv HTTP/1.1\r\n".encode() + HOST + b"\r\n")
        time.sleep(PATIENCE + 1.5)
        received = len(stuck.rest())
        assert received < 20_000_000


def test_who_waits_for_news_is_not_taken_for_slow(port: int, engine: Engine) -> None:
    audit = make_audit(engine)
    with wire(port) as patient:
        path = f"/v1/audits/{audit.id}?wait=2".encode()
        patient.send(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b'If-None-Match: "1"\r\n\r\n')
        assert int(patient.socket.recv(65536).split()[1]) == 304
        assert patient.seconds > 2 * PATIENCE
