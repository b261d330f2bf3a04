"""Stands between the service and its broker: loses messages, multiplies them, freezes, cuts.

It reads what clients send as RESP, the protocol of Redis: an array of strings per command.
"""

import random
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from app.jobs import QUEUES

QUEUE_KEYS = {name.encode() for name in QUEUES}


class BrokerProxy:
    """Passes everything on, except as it is told.

    Attributes:
        drop: share of the messages that are lost.
        copies: how often each of the others is sent.
        counts: what was done to messages.
    """

    def __init__(self, path: Path, target: Path, *, seed: int) -> None:
        self._target = str(target)
        self._random = random.Random(seed)
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self.drop = 0.0
        self.copies = 1
        self.counts: Counter[str] = Counter()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections off."""
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Let nothing through any more, and keep the connections."""
        self._flows.clear()

    def thaw(self) -> None:
        """Let everything through again."""
        self._flows.set()

    def close(self) -> None:
        self.thaw()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:
                client.close()
                continue
            self._open |= {client, server}
            for run in (self._upstream, self._downstream):
                threading.Thread(target=run, args=(client, server), daemon=True).start()

    def _downstream(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while received := server.recv(65536):
                self._flows.wait()
                client.sendall(received)
        self._end(client, server)

    def _upstream(self, client: socket.socket, server: socket.socket) -> None:
        buffer = b""
        with suppress(OSError):
            while received := client.recv(65536):
                self._flows.wait()
                buffer += received
                while found := _command(buffer):
                    words, size = found
                    server.sendall(self._changed(words) or buffer[:size])
                    buffer = buffer[size:]
        self._end(client, server)

    def _end(self, *ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)

    def _changed(self, words: list[bytes]) -> bytes | None:
        """Return another command in place of one that sends a message; None leaves it."""
        is_message = words[0].upper() == b"LPUSH" and words[1] in QUEUE_KEYS
        if not is_message:
            return None
        if self._random.random() < self.drop:
            self.counts["dropped"] += 1
            return _encoded([b"LLEN", words[1]])  # it answers with a number too
        if self.copies > 1:
            self.counts["multiplied"] += 1
        return _encoded([*words[:2], *words[2:] * self.copies])


def _command(buffer: bytes) -> tuple[list[bytes], int] | None:
    """Return the first command and its length; None while it is not whole."""
    head, found, _ = buffer.partition(b"\r\n")
    if not found:
        return None
    assert head.startswith(b"*"), head
    place = len(head) + 2
    words = []
    for _ in range(int(head[1:])):
        end = buffer.find(b"\r\n", place)
        if end < 0:
            return None
        size = int(buffer[place + 1 : end])
        start = end + 2
        if len(buffer) < start + size + 2:
            return None
        words.append(buffer[start : start + size])
        place = start + size + 2
    return words, place


def _encoded(words: list[bytes]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)
