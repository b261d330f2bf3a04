"""Files of a finished audit: whole or not at all, and gone on with where they broke off.

What came so far stands beside the file as `NAME.part`, with the ETag that it belongs to in
`NAME.part.etag`; a later call, also of another program, asks for the rest only.
"""

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import httpx2

from winnow.connection import Connection
from winnow.errors import DownloadDamaged, ServiceUnreachable, WinnowError
from winnow.transport import Streamed

_SHA256_ETAG = re.compile(r'"([0-9a-f]{64})"')
_HASH_BYTES = 1024**2


async def save(connection: Connection, source: str, path: Path) -> None:
    """Download to `path`, checked against the SHA-256 that is the file's ETag.

    The file appears under its name only when it is complete; until then what was there before
    stays. A connection that breaks is taken up again as long as every try brings something.

    Raises:
        DownloadDamaged: the bytes do not have the checksum, or there is none to compare with.
        ServiceUnreachable: the connection keeps breaking; what came is kept for the next call.
        OSError: the file cannot be written.
    """
    part = _Part(path)
    while True:
        before = part.size()
        try:
            return await connection.retry(lambda: _continue(connection, source, part))
        except ServiceUnreachable:
            if part.size() <= before:
                raise


async def save_stream(
    connection: Connection, source: str, path: Path, *, params: dict[str, str]
) -> Path:
    """Download what the service makes on the way, which has no checksum and starts anew each time.

    The file appears under its name only when it is complete.

    Args:
        connection: to the service.
        source: the path of what is downloaded.
        path: where to; in a folder it gets the name that the service gives it.
        params: of the call.
    """
    is_folder = path.is_dir()  # noqa: ASYNC240  see AsyncClient

    async def fetch() -> Path:
        async with connection.stream(source, params=params) as streamed:
            to = path / _name_of(streamed.response) if is_folder else path
            part = to.with_name(f"{to.name}.part")
            try:
                with part.open("wb") as file:
                    async for piece in streamed.pieces:
                        file.write(piece)
                part.replace(to)
            finally:
                part.unlink(missing_ok=True)
        return to

    return await connection.retry(fetch)


def _name_of(response: httpx2.Response) -> str:
    """Return the file's name by the service, without any folders."""
    header = Message()
    header["content-disposition"] = response.headers.get("content-disposition", "")
    name = Path((header.get_filename() or "").replace("\\", "/")).name
    return name if name.strip(".") else "export"


@dataclass(frozen=True)
class _Part:
    """What came of a file so far."""

    path: Path

    @property
    def file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def etag_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.etag")

    def size(self) -> int:
        try:
            return self.file.stat().st_size
        except FileNotFoundError:
            return 0

    def etag(self) -> str | None:
        """Return the ETag of what came so far, None where there is nothing to go on from."""
        try:
            etag = self.etag_file.read_text("ascii")
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return etag if _SHA256_ETAG.fullmatch(etag) and self.size() else None

    def start(self, etag: str) -> None:
        """Forget what came, before the bytes of another version do."""
        self.discard()
        self.etag_file.write_text(etag, "ascii")
        self.file.touch()

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self.file.open("rb") as file:
            while piece := file.read(_HASH_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def finish(self) -> None:
        self.file.replace(self.path)
        self.etag_file.unlink(missing_ok=True)

    def discard(self) -> None:
        for file in (self.file, self.etag_file):
            with suppress(FileNotFoundError):
                file.unlink()


async def _continue(connection: Connection, source: str, part: _Part) -> None:
    """Make one try, from where the last one broke off."""
    known = part.etag()
    headers = {"Accept-Encoding": "identity"}  # the checksum is of the file as it is
    if known is not None:
        headers |= {"Range": f"bytes={part.size()}-", "If-Range": known}
    try:
        async with connection.stream(source, headers=headers) as streamed:
            etag = await _receive(streamed, part)
    except WinnowError as error:
        if known is None or error.status != httpx2.codes.RANGE_NOT_SATISFIABLE:
            raise
        part.discard()  # there is more than the file has by now
        return await _continue(connection, source, part)
    found = part.sha256()
    if f'"{found}"' == etag:
        return part.finish()
    part.discard()
    if known is not None:  # what was there before may have been damaged on disk
        return await _continue(connection, source, part)
    raise DownloadDamaged(
        "Damaged download",
        detail=f"{part.path.name} should have the SHA-256 {etag[1:-1]} but came with {found}; "
        "it was not saved. Try again.",
    )


async def _receive(streamed: Streamed, part: _Part) -> str:
    """Write what comes where it belongs, and return the ETag of the file that it is of."""
    response = streamed.response
    etag = str(response.headers.get("etag", ""))
    if _SHA256_ETAG.fullmatch(etag) is None:
        raise DownloadDamaged(
            "Download without a checksum",
            detail=f"{response.request.url} came without a SHA-256 as its ETag; "
            "does a proxy rewrite it?",
        )
    first = part.size()
    goes_on = (
        response.status_code == httpx2.codes.PARTIAL_CONTENT
        and etag == part.etag()
        and response.headers.get("content-range", "").startswith(f"bytes {first}-")
    )
    if not goes_on:
        part.start(etag)
        if response.status_code == httpx2.codes.PARTIAL_CONTENT:
            raise httpx2.RemoteProtocolError("Another part came than was asked for")
    with part.file.open("r+b") as file:  # not appending: a second program would write the same
        file.seek(first if goes_on else 0)
        async for piece in streamed.pieces:
            file.write(piece)
    return etag
