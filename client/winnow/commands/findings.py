"""What `winnow doctor` finds; a service that is installed here adds checks of its own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: ok; warn where something may be wanted; fail where something cannot work.
        detail: what was found.
        advice: what to do about it, where it is not ok.
    """

    name: str
    status: Status
    detail: str
    advice: str | None = None


Checks = Callable[[], Iterable[Finding]]

_checks: dict[str, Checks] = {}


def add_checks(owner: str, checks: Checks) -> None:
    """Let `winnow doctor` also look at what `checks` does; once for each owner."""
    _checks[owner] = checks


def added_findings() -> Iterable[Finding]:
    """Yield what the added checks find, one after the other."""
    for checks in _checks.values():
        yield from checks()
