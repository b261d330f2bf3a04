"""Calls over many kept connections, cheaply: this machine has to serve them as well.

A closed loop sends the next call when the answer is there, and so finds what a server can do. An
open loop sends by a schedule, and counts from when a call was due: if a server falls behind, the
waiting is in the figures (what is known as coordinated omission is not possible).
"""

import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HEAD_END = b"\r\n\r\n"


def get(path: str, **headers: str) -> bytes:
    """Return a request as bytes."""
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode()


class Connection:
    """One kept connection; it is asked for one answer at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connect()

    def _connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self._port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got = b""

    def send(self, request: bytes) -> None:
        """Send a request."""
        self.socket.sendall(request)

    def receive(self) -> int | None:
        """Read what there is; return the status when the answer is whole.

        Raises:
            OSError: the server hung up.
        """
        part = self.socket.recv(1 << 16)
        if not part:
            raise ConnectionResetError("the server hung up")
        self._got += part
        end = self._got.find(HEAD_END)
        if end < 0:
            return None
        head = self._got[:end].lower()
        _, _, rest = head.partition(b"content-length:")
        length = int(rest.split(b"\r\n", 1)[0] or 0)
        if len(self._got) < end + len(HEAD_END) + length:
            return None
        self.body = self._got[end + len(HEAD_END) :]
        self._got = b""
        return int(head.split(b" ", 2)[1])

    def again(self) -> None:
        """Connect anew."""
        self.socket.close()
        self._connect()


def closed_loop(port: int, request: bytes, *, connections: int, seconds: float) -> float:
    """Return answers a second, of as many calls at once as there are connections.

    Raises:
        RuntimeError: an answer that is not 200.
    """
    num_answers = 0
    with selectors.DefaultSelector() as waiting:
        every = [Connection(port) for _ in range(connections)]
        for connection in every:
            waiting.register(connection.socket, selectors.EVENT_READ, connection)
            connection.send(request)
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            for key, _ in waiting.select():
                status = key.data.receive()
                if status is not None:
                    if status != 200:
                        raise RuntimeError(f"{status} {key.data.body!r}")
                    num_answers += 1
                    key.data.send(request)
        rate = num_answers / (time.perf_counter() - began)
    for connection in every:
        connection.socket.close()
    return rate


@dataclass
class OpenLoop:
    """What came of calls by a schedule.

    Attributes:
        milliseconds: of every answer, from when its call was due.
        statuses: how often each was answered; "lost" for connections that broke.
        late: the most milliseconds that a call left this program behind its time although its
            connection was free: what the figures owe to the program and not to the server.
    """

    milliseconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    late: float = 0.0

    def percentile(self, share: float) -> float:
        """Return the milliseconds that a share of the answers stayed within."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _receive(
    client: "Connection", waiting: selectors.BaseSelector, key: selectors.SelectorKey
) -> int | None:
    """Return the status of an answer that is whole, 0 where the connection broke."""
    try:
        return client.receive()
    except OSError:
        waiting.unregister(key.fileobj)
        client.again()
        waiting.register(client.socket, selectors.EVENT_READ, key.data)
        return 0


def open_loop(
    port: int,
    requests: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> OpenLoop:
    """Let as many clients as there are requests poll, each in its turn, `rate` calls a second.

    Args:
        port: of the server.
        requests: one a client, which has a connection of its own.
        rate: of all clients together.
        seconds: how long; answers that are out then are waited for.
        meanwhile: called ten times a second, and must be quick.
    """
    result = OpenLoop()
    clients = [Connection(port) for _ in requests]
    due: list[deque[float]] = [deque() for _ in requests]
    number, total = 0, int(rate * seconds)
    answered = 0
    with selectors.DefaultSelector() as waiting:
        for place, client in enumerate(clients):
            waiting.register(client.socket, selectors.EVENT_READ, place)
        began = time.perf_counter()
        next_look = began
        while answered < total:
            now = time.perf_counter()
            while number < total and began + number / rate <= now:
                place = number % len(clients)
                at = began + number / rate
                due[place].append(at)
                if len(due[place]) == 1:  # else it goes out behind the answer that is awaited
                    result.late = max(result.late, 1000 * (time.perf_counter() - at))
                    clients[place].send(requests[place])
                number += 1
            if now >= next_look:
                next_look = now + 0.1
                meanwhile()
            pause = began + number / rate - time.perf_counter() if number < total else 1.0
            for key, _ in waiting.select(max(0.0, min(pause, 0.1))):
                place = key.data
                status = _receive(clients[place], waiting, key)
                if status is None:
                    continue
                answered += 1
                result.statuses[str(status or "lost")] += 1
                result.milliseconds.append(1000 * (time.perf_counter() - due[place].popleft()))
                if due[place]:
                    clients[place].send(requests[place])
    for client in clients:
        client.socket.close()
    return result
