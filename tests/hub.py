"""A small Hugging Face hub on loopback, for the real client libraries to talk to.

It speaks what `huggingface_hub` asks for when it pins, lists and downloads: revision, tree and
resolve. Everything it was asked is kept in `requests`, so that tests can show what was not asked.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

RepositoryKind = Literal["models", "datasets"]


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Request:
    """One request that the hub was sent."""

    method: str
    path: str
    authorization: str | None


@dataclass
class Repository:
    """Commits by id, branches by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None


@dataclass
class LoopbackHub:
    """Repositories, and what happened to them.

    Attributes:
        endpoint: the address to give as the hub's endpoint.
        status: answer everything with this status instead, if set.
        sends_on_to: the address of the server that has the files' bytes, if another has.
    """

    endpoint: str = ""
    status: int | None = None
    sends_on_to: str | None = None
    requests: list[Request] = field(default_factory=list)
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)

    def push(
        self,
        kind: RepositoryKind,
        repo: str,
        files: Mapping[str, bytes],
        *,
        branch: str = "main",
        token: str | None = None,
    ) -> str:
        """Commit files as the whole content of a branch; return the commit.

        With a token, only requests that carry it find the repository.
        """
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(files.items()):
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        commit = digest.hexdigest()
        repository = self.repositories.setdefault((kind, repo), Repository(token=token))
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def paths_of(self, method: str) -> list[str]:
        """Return the paths that were asked with a method."""
        return [request.path for request in self.requests if request.method == method]


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Run a hub on a free loopback port."""
    hub = LoopbackHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _HubError(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    served: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent: `requests` is the log."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("authorization")
        self.served.requests.append(Request(self.command, path, authorization))
        try:
            parts = path.strip("/").split("/")
            if self.served.status is not None:
                self._send(self.served.status, b"", {})
            elif parts[0] == "api":
                self._answer_api(parts[1:])
            else:
                self._answer_file(parts)
        except _HubError as error:
            self._send(error.status, b"", {"X-Error-Code": error.code})

    def _answer_api(self, parts: list[str]) -> None:
        kind, owner, name, verb, revision = parts[:5]
        repository = self._repository(kind, f"{owner}/{name}")
        commit, files = self._at(repository, revision)
        answer: object
        if verb == "revision":
            answer = {"id": f"{owner}/{name}", "sha": commit, "private": False, "siblings": []}
        else:
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            answer = [
                {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                for path, content in files.items()
                if recursive or "/" not in path
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, parts: list[str]) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, verb, revision, *path = parts[1:] if kind == "datasets" else parts
        repository = self._repository(kind, f"{owner}/{name}")
        commit, files = self._at(repository, revision)
        content = files.get("/".join(path))
        if verb != "resolve" or content is None:
            raise _HubError(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"'}
        if self.served.sends_on_to is None:
            self._send(200, content, headers)
            return
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        where = f"{self.served.sends_on_to}/{_etag(content)}"
        self._send(302, b"", {**headers, **linked, "Location": where})

    def _repository(self, kind: str, repo: str) -> Repository:
        repository = self.served.repositories.get((kind, repo))
        if repository is None:
            raise _HubError(401, "RepoNotFound")
        if repository.token is not None:
            if self.headers.get("authorization") is None:
                raise _HubError(401, "GatedRepo")
            if self.headers.get("authorization") != f"Bearer {repository.token}":
                raise _HubError(403, "GatedRepo")
        return repository

    def _at(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _HubError(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
