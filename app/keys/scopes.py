"""What a key may do: its scopes, and which of them each call needs."""

import re
from collections.abc import Iterable
from enum import StrEnum

from app.keys.cookie import SAFE_METHODS


class Scope(StrEnum):
    """One right of a key; none includes another."""

    AUDITS_READ = "audits:read"
    AUDITS_WRITE = "audits:write"
    DECISIONS_WRITE = "decisions:write"
    DATASETS_READ = "datasets:read"
    DATASETS_WRITE = "datasets:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    TRAIL_READ = "trail:read"


ALL_SCOPES = frozenset(Scope)
MEANING = {
    Scope.AUDITS_READ: "see audits, rankings, experiments, results, decisions and exports; the "
    "pages",
    Scope.AUDITS_WRITE: "submit, cancel and delete audits, rankings and experiments",
    Scope.DECISIONS_WRITE: "decide on samples, preview and undo it",
    Scope.DATASETS_READ: "see uploaded datasets",
    Scope.DATASETS_WRITE: "upload and delete datasets",
    Scope.WEBHOOKS_READ: "see webhooks and their deliveries",
    Scope.WEBHOOKS_WRITE: "make, rotate, test and delete webhooks, send messages again",
    Scope.TRAIL_READ: "see who did what",
}

# The first that fits: paths with what reading and changing there needs. A path that is not here
# is closed to every key, so that a new one is not open by accident.
_AREAS: tuple[tuple[re.Pattern[str], Scope | None, Scope | None], ...] = tuple(
    (re.compile(path), reading, changing)
    for path, reading, changing in (
        (r"/v1/audits/[^/]+/decisions(/|$)", Scope.AUDITS_READ, Scope.DECISIONS_WRITE),
        (r"/v1/(audits|experiments)(/|$)", Scope.AUDITS_READ, Scope.AUDITS_WRITE),
        (r"/v1/datasets(/|$)", Scope.DATASETS_READ, Scope.DATASETS_WRITE),
        (r"/v1/webhooks(/|$)", Scope.WEBHOOKS_READ, Scope.WEBHOOKS_WRITE),
        (r"/v1/trail$", Scope.TRAIL_READ, Scope.TRAIL_READ),
        (r"/v1/(estimators|aggregations)$", None, None),
        (r"/($|audits/)", Scope.AUDITS_READ, Scope.AUDITS_READ),  # the pages
    )
)


class NoSuchArea(LookupError):
    """No scope was given to this path."""


def scope_of(method: str, path: str) -> Scope | None:
    """Return the scope that a call needs; None where any key will do.

    Raises:
        NoSuchArea: the path has no scope, so no key opens it.
    """
    for pattern, reading, changing in _AREAS:
        if pattern.match(path):
            return reading if method in SAFE_METHODS else changing
    raise NoSuchArea(path)


def read_scopes(words: str) -> frozenset[Scope]:
    """Return the scopes that a person names, separated by commas or spaces.

    Raises:
        ValueError: one of them is none, or there are none.
    """
    names = [name for name in re.split(r"[,\s]+", words) if name]
    unknown = sorted(set(names) - set(Scope))
    if unknown or not names:
        raise ValueError(
            f"{', '.join(unknown) or 'nothing'} is no scope; there are {', '.join(Scope)}"
        )
    return frozenset(map(Scope, names))


def in_order(scopes: Iterable[str]) -> list[str]:
    """Return scopes as they are listed above."""
    return [scope.value for scope in Scope if scope in set(scopes)]
