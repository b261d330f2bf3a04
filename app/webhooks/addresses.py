"""Which addresses a webhook may have, by what can be told without looking a name up."""

from urllib.parse import urlsplit

from AntiSSRF import AntiSSRFPolicy

from app.errors import InvalidRequest
from app.outbound import may_be_called, outbound_policy
from app.settings import Settings

POINTER = "#/url"
SMALLEST_PORT = 1024
WEB_PORTS = frozenset({80, 443})


def policy_of(settings: Settings) -> AntiSSRFPolicy:
    """Return which addresses are called: global ones, and networks that the operator allows."""
    policy = outbound_policy(settings.webhook_networks)
    policy.allow_plain_text_http = settings.webhook_plain_http
    policy.add_xff_header = False  # it would tell receivers of a caller named "true"
    return policy


def check_url(settings: Settings, url: str) -> None:
    """Check a webhook's address; names are looked up, and their addresses checked, at every call.

    Raises:
        InvalidRequest: it is not one that this service calls; names the field.
    """
    if not url.isascii() or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise InvalidRequest.at(POINTER, "The URL holds a character that must be encoded.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidRequest.at(POINTER, f"Not a URL: {error}.") from error
    if parts.scheme == "http" and not settings.webhook_plain_http:
        raise InvalidRequest.at(
            POINTER,
            "Plain http is not allowed here: use https, or ask the operator for "
            "WINNOW_WEBHOOK_PLAIN_HTTP.",
        )
    if parts.scheme not in {"http", "https"}:
        raise InvalidRequest.at(POINTER, "Give a whole URL that begins with https://.")
    if not host or "\\" in url:
        raise InvalidRequest.at(POINTER, "The URL names no host.")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest.at(
            POINTER,
            "The URL carries a user or a password. Leave them out: the signature proves who calls.",
        )
    if parts.fragment:
        raise InvalidRequest.at(POINTER, "The URL has a fragment, which is never sent.")
    if port is not None and port not in WEB_PORTS and port < SMALLEST_PORT:
        raise InvalidRequest.at(POINTER, f"Port {port} is not called: use 443, 80 or 1024 and up.")
    if not may_be_called(policy_of(settings), host):
        raise InvalidRequest.at(
            POINTER,
            "This address is not a public one, and only those are called. An operator can "
            "allow networks by WINNOW_WEBHOOK_NETWORKS.",
        )
