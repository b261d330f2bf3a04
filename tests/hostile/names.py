"""A name server on loopback that answers as the test says, and otherwise the next time.

It speaks DNS over UDP (RFC 1035, section 4): one question, A records, time to live zero.
"""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_QUESTION_BYTES = 4
_HEADER = struct.Struct(">HHHHHH")
_ANSWER = struct.Struct(">HHHIH4s")
_IS_ANSWER, _NO_SUCH_NAME = 0x8180, 0x8183
_TO_THE_QUESTION = 0xC00C


class NameServer:
    """Names, and the addresses that they have at one question after the other."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self._answers: dict[str, list[list[str]]] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._socket.getsockname()

    def say(self, name: str, *answers: list[str]) -> None:
        """Answer questions for a name one after the other; the last answer stands for the rest."""
        self._answers[name] = list(answers)

    def serve(self) -> None:
        """Answer until the socket is closed."""
        while True:
            try:
                question, sender = self._socket.recvfrom(512)
            except OSError:
                return
            if not question:
                return
            self._socket.sendto(self._answer(question), sender)

    def close(self) -> None:
        """End the service."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.address)

    def _answer(self, question: bytes) -> bytes:
        labels, end = [], _HEADER.size
        while length := question[end]:
            labels.append(question[end + 1 : end + 1 + length].decode())
            end += 1 + length
        name = ".".join(labels)
        asked = question[_HEADER.size : end + 1 + _QUESTION_BYTES]
        (identity,) = struct.unpack(">H", question[:2])
        self.questions.append(name)
        answers = self._answers.get(name)
        if answers is None:
            return _HEADER.pack(identity, _NO_SUCH_NAME, 1, 0, 0, 0) + asked
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        records = b"".join(
            _ANSWER.pack(_TO_THE_QUESTION, 1, 1, 0, 4, socket.inet_aton(address))
            for address in addresses
        )
        return _HEADER.pack(identity, _IS_ANSWER, 1, len(addresses), 0, 0) + asked + records


@contextmanager
def name_server() -> Iterator[NameServer]:
    """Run a name server on a free loopback port."""
    server = NameServer()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def look_up(server: NameServer, host: str, port: int) -> list[Any]:
    """Ask the server for a name, as getaddrinfo asks the system's."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in host.split("."))
    question = _HEADER.pack(1, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.settimeout(5)
        own.sendto(question, server.address)
        answer = own.recv(2048)
    _, _, _, count, _, _ = _HEADER.unpack(answer[: _HEADER.size])
    if count == 0:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    records = answer[len(question) :]
    found = [
        socket.inet_ntoa(_ANSWER.unpack_from(records, number * _ANSWER.size)[5])
        for number in range(count)
    ]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]
