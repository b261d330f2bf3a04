"""One signed call to a receiver: its address checked and pinned, its time and answer bounded."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from socket import SHUT_RDWR, socket
from typing import Any

import orjson
import requests
from AntiSSRF import AntiSSRFError
from requests.adapters import HTTPAdapter
from standardwebhooks import Webhook as Signer
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from app.settings import Settings
from app.version import VERSION
from app.webhooks.addresses import policy_of

TIMEOUT_SECONDS = 10.0
MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class Call:
    """What is sent, and where.

    Attributes:
        message_id: the same at every try.
        secrets: each signs; there are two while one replaces the other.
    """

    message_id: str
    url: str
    payload: dict[str, Any]
    secrets: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        status_code: of the answer, if there was one.
        error: what went wrong; None for success.
        seconds: how long it took.
    """

    status_code: int | None
    error: str | None
    seconds: float

    @property
    def is_gone(self) -> bool:
        """Whether the receiver wants no more calls."""
        return self.status_code == HTTPStatus.GONE


class Caller:
    """Makes calls, from several threads at once, until it is stopped."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: set[_Deadline] = set()
        self._lock = threading.Lock()
        self.is_stopped = False

    def call(self, call: Call) -> Outcome:
        """Make a call and return how it ended, whatever that is."""
        started = time.monotonic()
        status_code, error = None, None
        with self._deadline() as deadline:
            try:
                status_code = self._post(call, deadline)
            except AntiSSRFError:
                error = "The address is not one that this service calls; only public ones are."
            except (requests.RequestException, OSError, ValueError) as raised:
                error = _explain(raised)
            if error and deadline.is_over:
                error = f"No answer within {TIMEOUT_SECONDS:g} seconds."
        if status_code is not None and not HTTPStatus(200) <= status_code < HTTPStatus(300):
            error = f"The receiver answered {status_code}."
            if status_code in range(300, 400):
                error += " Redirects are not followed."
        return Outcome(status_code, error, round(time.monotonic() - started, 3))

    def stop(self) -> None:
        """Break off all calls and make no more."""
        with self._lock:
            self.is_stopped = True
            for deadline in self._open:
                deadline.end()

    @contextmanager
    def _deadline(self) -> Iterator["_Deadline"]:
        deadline = _Deadline()
        with self._lock:
            self._open.add(deadline)
            if self.is_stopped:
                deadline.end()
        try:
            yield deadline
        finally:
            with self._lock:
                self._open.discard(deadline)
            deadline.close()

    def _post(self, call: Call, deadline: "_Deadline") -> int:
        body = orjson.dumps(call.payload)
        with policy_of(self._settings).get_antissrf_session() as session:
            session.trust_env = False  # a proxy would look the name up again; nor netrc's passwords
            if self._settings.webhook_ca_file is not None:
                session.verify = str(self._settings.webhook_ca_file)
            for adapter in session.adapters.values():
                deadline.watch(adapter)
            with session.post(
                call.url,
                data=body,
                headers=_headers(call, body),
                timeout=TIMEOUT_SECONDS,
                allow_redirects=False,
                stream=True,  # the answer's body is not read
            ) as response:
                status_code: int = response.status_code
                return status_code


def _headers(call: Call, body: bytes) -> dict[str, str]:
    now = datetime.now(UTC)
    signatures = [
        Signer(secret).sign(call.message_id, now, body.decode()) for secret in call.secrets
    ]
    return {
        "content-type": "application/json",
        "user-agent": f"Winnow/{VERSION}",
        "webhook-id": call.message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _explain(error: Exception) -> str:
    if isinstance(error, requests.exceptions.Timeout):
        return f"No answer within {TIMEOUT_SECONDS:g} seconds."
    kind = "TLS failed" if isinstance(error, requests.exceptions.SSLError) else "No connection"
    cause: BaseException = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return f"{kind}: {reason}"[:MAX_ERROR_CHARS]


class _Deadline:
    """Ends the connections of one call when its time is over.

    The timeouts of sockets begin anew with every byte, so a receiver that drips would hold a call
    for ever.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._sockets: list[socket] = []
        self._timer = threading.Timer(TIMEOUT_SECONDS, self.end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, adapter: HTTPAdapter) -> None:
        """Let the adapter's connections be known here."""
        watched = self._add

        class Plain(HTTPConnection):
            def _new_conn(self) -> socket:
                return watched(super()._new_conn())

        class Encrypted(HTTPSConnection):
            def _new_conn(self) -> socket:
                return watched(super()._new_conn())

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class EncryptedPool(HTTPSConnectionPool):
            ConnectionCls = Encrypted

        pools = {"http": PlainPool, "https": EncryptedPool}
        adapter.poolmanager.pool_classes_by_scheme = pools

    def _add(self, connection: socket) -> socket:
        # a copy, since TLS takes the original over
        self._sockets.append(connection.dup())
        if self.is_over:
            self.end()
        return connection

    def end(self) -> None:
        """Break the connections off."""
        self.is_over = True
        for copy in self._sockets:
            with suppress(OSError):
                copy.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Forget the connections."""
        self._timer.cancel()
        for copy in self._sockets:
            copy.close()
