"""One call to a receiver: signed, to checked addresses only, and bounded whatever comes back."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from app.settings import Settings
from app.webhooks import calls
from app.webhooks.calls import Call, Caller, Outcome
from tests.webhooks.conftest import networks
from tests.webhooks.receiver import Receiver

SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
OTHER = "whsec_YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXphYmNkZWY="
PAYLOAD = {"type": "audit.succeeded", "timestamp": "2026-11-28T00:00:00Z", "data": {"id": "ü"}}
GLOBAL = "93.184.215.14"


def call(settings: Settings, url: str, *secrets: str) -> Outcome:
    return Caller(settings).call(Call("msg_1", url, PAYLOAD, secrets or (SECRET,)))


def test_the_library_verifies_what_is_sent(settings: Settings, receiver: Receiver) -> None:
    outcome = call(settings, receiver.url)
    assert (outcome.status_code, outcome.error) == (200, None)
    (received,) = receiver.received
    assert received.verify(SECRET) == PAYLOAD
    assert received.id == "msg_1"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["user-agent"].startswith("Winnow/")
    for headers in (received.headers | {"webhook-id": "msg_2"}, received.headers):
        forged = received.body.replace(b"succeeded", b"failed")
        body = received.body if headers is not received.headers else forged
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body, headers)


def test_while_secrets_change_both_verify(settings: Settings, receiver: Receiver) -> None:
    call(settings, receiver.url, SECRET, OTHER)
    (received,) = receiver.received
    assert received.verify(SECRET) == received.verify(OTHER) == PAYLOAD


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_every_2xx_is_success(settings: Settings, receiver: Receiver, status: int) -> None:
    receiver.statuses = [status]
    assert call(settings, receiver.url).error is None


@pytest.mark.parametrize("status", [400, 404, 410, 429, 500, 503])
def test_everything_else_is_told(settings: Settings, receiver: Receiver, status: int) -> None:
    receiver.statuses = [status]
    outcome = call(settings, receiver.url)
    assert (outcome.status_code, outcome.error) == (status, f"The receiver answered {status}.")
    assert outcome.is_gone == (status == 410)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(settings: Settings, receiver: Receiver, status: int) -> None:
    receiver.statuses = [status]
    receiver.location = f"http://127.0.0.1:{receiver.port}/elsewhere"
    assert "Redirects are not followed" in (call(settings, receiver.url).error or "")
    assert [received.path for received in receiver.received] == ["/hook"]


def test_nobody_there_is_told(settings: Settings) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        outcome = call(settings, url)
    assert outcome.status_code is None
    assert "Connection refused" in (outcome.error or "")
    assert "No connection" in (call(settings, "http://nobody.invalid/").error or "")


def test_tls_that_is_none_is_told(settings: Settings, receiver: Receiver) -> None:
    outcome = call(settings, receiver.url.replace("http:", "https:"))
    assert (outcome.error or "").startswith("TLS failed")
    assert receiver.received == []


def test_a_receiver_that_drips_cannot_hold_a_call(
    settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "TIMEOUT_SECONDS", 0.5)
    receiver.drips = True
    outcome = call(settings, receiver.url)
    assert outcome.error == "No answer within 0.5 seconds."
    assert outcome.seconds < 3


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_receiver_that_is_silent_cannot_hold_a_call(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(calls, "TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        outcome = call(settings, f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/")
    assert outcome.error == "No answer within 0.5 seconds."
    assert outcome.seconds < 3


def test_a_stop_breaks_calls_off(settings: Settings, receiver: Receiver) -> None:
    receiver.drips = True
    caller = Caller(settings)
    timer = threading.Timer(0.3, caller.stop)
    timer.start()
    started = time.monotonic()
    outcome = caller.call(Call("msg_1", receiver.url, PAYLOAD, [SECRET]))
    assert outcome.error is not None
    assert time.monotonic() - started < 3
    timer.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates")
class TestTls:
    """The number that was checked is called, but the certificate must be the name's."""

    @pytest.fixture
    def certificate(self, tmp_path: Path) -> Path:
        """A certificate of localhost with its key, in one file."""
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
        names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key)]
        subprocess.run(
            [*make.split(), *names, "-out", str(certificate)], check=True, capture_output=True
        )
        certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
        return certificate

    @pytest.fixture
    def encrypted(self, receiver: Receiver, certificate: Path) -> Receiver:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        return receiver

    @pytest.fixture
    def settings(self, settings: Settings, certificate: Path) -> Settings:
        update = {"webhook_plain_http": False, "webhook_ca_file": certificate}
        return settings.model_copy(update=update)

    def test_a_name_with_its_certificate_is_called(
        self, settings: Settings, encrypted: Receiver
    ) -> None:
        outcome = call(settings, f"https://localhost:{encrypted.port}/hook")
        assert outcome.error is None
        assert encrypted.received[0].verify(SECRET) == PAYLOAD

    @pytest.mark.parametrize("is_known", [True, False])
    def test_another_name_or_an_unknown_certificate_is_not(
        self, settings: Settings, encrypted: Receiver, is_known: bool
    ) -> None:
        host = "127.0.0.1" if is_known else "localhost"
        trusting = settings if is_known else settings.model_copy(update={"webhook_ca_file": None})
        outcome = call(trusting, f"https://{host}:{encrypted.port}/hook")
        assert (outcome.error or "").startswith("TLS failed: ")
        assert encrypted.received == []


class TestAddressesInside:
    """Nothing reaches what only this machine or its network can reach."""

    @pytest.mark.parametrize(
        "host",
        [
            *("127.0.0.1", "127.1", "0x7f000001", "2130706433", "017700000001", "0", "0.0.0.0"),
            *("localhost", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]"),
            *("[64:ff9b::7f00:1]", "[fd00::1]", "[fe80::1]"),
            *("169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1"),
            *("224.0.0.1", "255.255.255.255", "168.63.129.16"),
        ],
    )
    def test_numbers_and_names_of_it_are_blocked(
        self, strict: Settings, receiver: Receiver, host: str
    ) -> None:
        outcome = call(strict, f"http://{host}:{receiver.port}/")
        assert "not one that this service calls" in (outcome.error or ""), outcome
        assert receiver.received == []

    def test_plain_http_is_blocked_where_it_is_not_allowed(
        self, settings: Settings, receiver: Receiver
    ) -> None:
        sealed = settings.model_copy(update={"webhook_plain_http": False})
        assert call(sealed, receiver.url).error is not None
        assert receiver.received == []

    @pytest.fixture
    def resolve(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
        """Let a name have other addresses at every lookup; numbers stay what they are."""
        really = socket.getaddrinfo
        answers: list[list[str]] = []

        def look_up(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
            if host != "evil.example":
                return really(host, port, *rest, **named)
            addresses = answers.pop(0) if len(answers) > 1 else answers[0]
            return [found for name in addresses for found in really(name, port, *rest, **named)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        return answers.extend  # type: ignore[return-value]

    @pytest.mark.parametrize("order", [[GLOBAL, "127.0.0.1"], ["127.0.0.1", GLOBAL]])
    def test_a_name_that_is_both_global_and_inside_is_blocked(
        self,
        strict: Settings,
        receiver: Receiver,
        resolve: Callable[..., None],
        order: list[str],
    ) -> None:
        resolve([order])
        outcome = call(strict, f"http://evil.example:{receiver.port}/")
        assert "not one that this service calls" in (outcome.error or "")
        assert receiver.received == []

    def test_the_address_that_was_checked_is_the_one_that_is_called(
        self, settings: Settings, receiver: Receiver, resolve: Callable[..., None]
    ) -> None:
        """A name that is another one when it is checked than a moment later gains nothing."""
        narrow = settings.model_copy(update={"webhook_networks": networks("127.0.0.2/32")})
        resolve([["127.0.0.2"], ["127.0.0.1"]])
        outcome = call(narrow, f"http://evil.example:{receiver.port}/")
        assert outcome.error == "No connection: Connection refused"
        assert "not one that" in (call(narrow, receiver.url).error or "")
        assert receiver.received == []

    def test_a_redirect_to_loopback_is_not_followed(
        self, settings: Settings, receiver: Receiver
    ) -> None:
        receiver.statuses = [302]
        receiver.location = f"http://0x7f000001:{receiver.port}/inside"
        call(settings, receiver.url)
        assert [received.path for received in receiver.received] == ["/hook"]

    def test_no_proxy_and_no_stored_password_is_used(
        self, settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
        assert call(settings, receiver.url).error is None
        assert "authorization" not in receiver.received[0].headers

    def test_a_network_that_is_allowed_is_called_and_no_other(
        self, settings: Settings, receiver: Receiver
    ) -> None:
        assert call(settings, f"http://localhost:{receiver.port}/").error is None
        assert call(settings, f"http://10.0.0.1:{receiver.port}/").status_code is None
        assert len(receiver.received) == 1
