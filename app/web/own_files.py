"""Our scripts, style and icon, and the addresses they are served under."""

import hashlib
import mimetypes
from functools import cache
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).with_name("static")
COMMON_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@cache
def static_version() -> str:
    """Return the version of our files: it changes when any of them does."""
    digest = hashlib.sha256()
    for path in sorted(path for path in STATIC.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(STATIC).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


class OwnFiles(StaticFiles):
    """Our files, under `{version}/{name}`.

    The version is a part of the path, so that a module's relative imports keep it. Another version
    is a page's that an earlier release drew: it gets today's file, which its browser does not keep.
    """

    def __init__(self) -> None:
        super().__init__(directory=STATIC)
        # The machine's own table may say otherwise, and browsers run modules of no other type.
        mimetypes.add_type("text/javascript", ".js")

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file with the headers of every page."""
        version, _, name = path.partition("/")
        response = await super().get_response(name, scope)
        is_current = version == static_version()
        caching = "public, max-age=31536000, immutable" if is_current else "no-cache"
        response.headers.update({**COMMON_HEADERS, "Cache-Control": caching})
        return response
