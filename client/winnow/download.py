"""Files of a finished audit, whole or not at all."""

import hashlib
import re
import secrets
from pathlib import Path

import httpx2

from winnow.errors import DownloadDamaged

_SHA256_ETAG = re.compile(r'"([0-9a-f]{64})"')


def save(response: httpx2.Response, path: Path) -> None:
    """Write a streamed answer to `path` when its SHA-256 is that of its ETag.

    The file appears under its name only when it is complete; on any error what was there before
    stays, and nothing half written is left.

    Raises:
        DownloadDamaged: the bytes do not have the checksum, or there is none to compare with.
        OSError: the file cannot be written.
    """
    etag = _SHA256_ETAG.fullmatch(response.headers.get("etag", ""))
    if etag is None:
        raise DownloadDamaged(
            "Download without a checksum",
            detail=f"{response.request.url} came without a SHA-256 as its ETag; "
            "does a proxy rewrite it?",
        )
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    digest = hashlib.sha256()
    try:
        with partial.open("xb") as file:
            for piece in response.iter_bytes():
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != etag[1]:
            raise DownloadDamaged(
                "Damaged download",
                detail=f"{path.name} should have the SHA-256 {etag[1]} but came with "
                f"{digest.hexdigest()}; it was not saved. Try again.",
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
