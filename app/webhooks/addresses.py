"""Which addresses a webhook may have, by what can be told without looking a name up."""

import socket
from urllib.parse import urlsplit

from AntiSSRF import AntiSSRFPolicy, PolicyConfigOptions

from app.errors import InvalidRequest
from app.settings import Settings

POINTER = "#/url"
SMALLEST_PORT = 1024
WEB_PORTS = frozenset({80, 443})


def policy_of(settings: Settings) -> AntiSSRFPolicy:
    """Return which addresses are called: global ones, and networks that the operator allows."""
    policy = AntiSSRFPolicy(PolicyConfigOptions.EXTERNAL_ONLY_LATEST)
    if settings.webhook_networks:
        policy.add_allowed_addresses([str(network) for network in settings.webhook_networks])
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
    if not _may_be_called(settings, host):
        raise InvalidRequest.at(
            POINTER,
            "This address is not a public one, and only those are called. An operator can "
            "allow networks by WINNOW_WEBHOOK_NETWORKS.",
        )


def _may_be_called(settings: Settings, host: str) -> bool:
    """Return whether a host is a name, or a number that the policy allows."""
    if host.rstrip(".").lower().split(".")[-1] == "localhost":
        host = "127.0.0.1"
    try:
        # as the system reads numbers: 127.1 and 0x7f000001 are some too
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return True
    addresses = [str(place[4][0]) for place in found]
    allowed: bool = policy_of(settings)._is_network_connection_allowed(addresses)  # noqa: SLF001  it has no public name
    return allowed
