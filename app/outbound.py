"""Which addresses this service calls for a caller: public ones, and networks of the operator's."""

import socket
from collections.abc import Sequence

from AntiSSRF import AntiSSRFPolicy, PolicyConfigOptions
from pydantic.networks import IPvAnyNetwork


def outbound_policy(networks: Sequence[IPvAnyNetwork]) -> AntiSSRFPolicy:
    """Return the policy: global addresses, and the networks that the operator allows."""
    policy = AntiSSRFPolicy(PolicyConfigOptions.EXTERNAL_ONLY_LATEST)
    if networks:
        policy.add_allowed_addresses([str(network) for network in networks])
    return policy


def are_allowed(policy: AntiSSRFPolicy, addresses: Sequence[str]) -> bool:
    """Return whether all addresses may be called."""
    allowed: bool = policy._is_network_connection_allowed(list(addresses))  # noqa: SLF001  it has no public name
    return allowed and bool(addresses)


def may_be_called(policy: AntiSSRFPolicy, host: str) -> bool:
    """Return whether a host is a name, or a number that the policy allows; looks nothing up."""
    if host.rstrip(".").lower().split(".")[-1] == "localhost":
        host = "127.0.0.1"
    try:
        # as the system reads numbers: 127.1 and 0x7f000001 are some too
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return True
    return are_allowed(policy, [str(place[4][0]) for place in found])
