"""A proxy on loopback that treats its callers badly."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

PIECE_BYTES = 4096


class CuttingProxy:
    """Hands bytes on, and cuts a connection when the service, or the caller, has sent so many."""

    def __init__(self, target: str, *, after_bytes: int, of_caller: int) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._after_bytes = after_bytes
        self._of_caller = of_caller
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.num_cut = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._serve_one, args=(caller,), daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()

    def _serve_one(self, caller: socket.socket) -> None:
        with caller, socket.create_connection(self._target) as service:
            up = threading.Thread(
                target=self._pass_on, args=(caller, service, self._of_caller), daemon=True
            )
            up.start()
            self._pass_on(service, caller, self._after_bytes)

    def _pass_on(self, source: socket.socket, target: socket.socket, left: int) -> None:
        with suppress(OSError):
            while left > 0 and (piece := source.recv(min(PIECE_BYTES, left))):
                target.sendall(piece)
                left -= len(piece)
        if left <= 0:
            self.num_cut += 1
            for end in (source, target):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting_proxy(
    target: str, *, after_bytes: int = 10**9, of_caller: int = 10**9
) -> Iterator[CuttingProxy]:
    """Run a proxy before `target` that cuts connections after so many bytes of either side."""
    proxy = CuttingProxy(target, after_bytes=after_bytes, of_caller=of_caller)
    thread = threading.Thread(target=proxy.serve)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
