"""An API key in a cookie, and proof that a change comes from a page of ours."""

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from app.errors import NotPermitted

KEY_COOKIE = "winnow_key"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def keep_key(response: Response, request: Request, key: str) -> None:
    """Keep a key in the browser until it is closed: out of reach of scripts and other sites."""
    response.set_cookie(
        KEY_COOKIE,
        key,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def forget_key(response: Response) -> None:
    """Take the key out of the browser."""
    response.delete_cookie(KEY_COOKIE, path="/", httponly=True, samesite="strict")


def refuse_other_sites(request: Request) -> None:
    """Refuse a change that no page of this server asked for.

    A browser sends the cookie along by itself, so the cookie alone does not say that its owner
    wanted the call.

    Raises:
        NotPermitted: another site asked, or nothing says who did.
    """
    if request.method in SAFE_METHODS or _is_same_origin(request):
        return
    raise NotPermitted(
        "This call came with the cookie of a signed-in page, but not from a page of this server. "
        "Programs send their API key as 'Authorization: Bearer wnw_…'."
    )


def _is_same_origin(request: Request) -> bool:
    site = request.headers.get("sec-fetch-site")  # browsers send it over HTTPS and to localhost
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:  # brackets that hold no address
        return False


def local_path(path: str) -> str:
    """Return where to go after signing in: a path of this server, whatever was asked for."""
    is_local = path.startswith("/") and not path.startswith(("//", "/\\"))
    return path if is_local and path.isprintable() else "/"
