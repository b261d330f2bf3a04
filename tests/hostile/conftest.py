"""Servers of strangers: names that change their address, and files behind https."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest

from app.datasets.files import DatasetLimits
from app.references import parse_dataset_reference
from tests.hostile.names import NameServer, look_up, name_server
from workers.sources.datasets import resolve_dataset
from workers.sources.hub import Hub
from workers.sources.local import ResolvedDataset

NAMES = ("files.test", "inside.test", "other.test")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    """A name server for all names below .test; everything else is looked up as ever."""
    really = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **options: Any) -> list[Any]:
        if isinstance(host, str) and host.endswith(".test") and not options.get("flags"):
            return look_up(server, host, int(port or 0))
        return really(host, port, *rest, **options)

    with name_server() as server:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield server


def no_upload(dataset_id: str) -> NoReturn:
    """Find an upload where there is none."""
    raise AssertionError(dataset_id)


def resolve_elsewhere(reference: str, folder: Path, **sources: Any) -> ResolvedDataset:
    """Resolve a reference to a dataset of 10 kB at most, where there is no hub and no upload."""
    return resolve_dataset(
        parse_dataset_reference(reference),
        find_upload=no_upload,
        roots=[],
        hub=Hub(endpoint="http://127.0.0.1:9", cache_dir=folder / "hub"),
        cache_dir=folder / "cache",
        limits=DatasetLimits(),
        max_bytes=10_000,
        **sources,
    )


class FileServer(ThreadingHTTPServer):
    """Answers GET by its `answers`: path to status, headers and body; remembers who was asked."""

    daemon_threads = True

    def __init__(self, address: str, port: int = 0) -> None:
        super().__init__((address, port), _Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.headers['host'].partition(':')[0]}{self.path}")
        status, headers, body = self.server.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent: `asked` is the log."""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of the names, with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    names = ",".join(f"DNS:{name}" for name in NAMES)
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    make += ["-subj", "/CN=files.test"]
    options = ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *options], check=True, capture_output=True)
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    return certificate


@pytest.fixture
def serve(certificate: Path) -> Iterator[Callable[..., FileServer]]:
    """Starts file servers behind TLS, at addresses of this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ExitStack() as stack:

        def start(address: str = "127.0.0.1", port: int = 0, *, tls: bool = True) -> FileServer:
            server = FileServer(address, port)
            if tls:
                server.socket = context.wrap_socket(
                    server.socket, server_side=True, do_handshake_on_connect=False
                )
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            stack.callback(server.server_close)
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield start
