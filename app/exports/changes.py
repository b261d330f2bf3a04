"""Which rows of a training set change, and how: by decisions, or by a ranking's flags alone.

An audit with planted noise judged labels (or completions) that the file does not have. So where a
sample's label was planted, a drop, a flag or a suggestion says nothing of the file's own label, and
the row stays as it is; only a label or completion that a reviewer gave it is taken.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, literal, or_, select
from sqlalchemy.orm import Session

from app.audits.filters import is_sample_of
from app.audits.models import Audit, RankedSample, Ranking, TrainingSample
from app.decisions.models import Action, Decision

Mode = Literal["decisions", "drop", "correct"]
Kind = Literal["drop", "relabel", "rewrite"]
_ROWS_PER_FETCH = 10_000


@dataclass(frozen=True)
class Change:
    """What happens to a row.

    Attributes:
        value: the label or the completion that it gets; None where it is left out.
        reviewer: who decided; None where nobody did.
    """

    kind: Kind
    value: str | None = None
    reviewer: str | None = None
    decided_at: datetime | None = None


class Changes:
    """The changes of a file by row, compactly: those of one batch are one object."""

    def __init__(self, num_rows: int, changes: Iterable[tuple[int, Change]]) -> None:
        self._code_of_row = array("i", bytes(4 * num_rows))
        self._code_of: dict[Change | None, int] = {None: 0}
        for index, change in changes:
            self._code_of_row[index] = self._code_of.setdefault(change, len(self._code_of))
        self._distinct = list(self._code_of)

    def at(self, index: int) -> Change | None:
        """Return what happens to a row, None for nothing."""
        return self._distinct[self._code_of_row[index]]

    def within(self, first: int, number: int) -> Mapping[int, Change]:
        """Return the changes of `number` rows from the one at `first`, counted from there."""
        codes = self._code_of_row[first : first + number]
        return {
            place: change
            for place, code in enumerate(codes)
            if (change := self._distinct[code]) is not None
        }

    def labels(self) -> set[str]:
        """Return all labels that rows get."""
        return {
            change.value
            for change in self._distinct
            if change is not None and change.kind == "relabel" and change.value is not None
        }


def read_changes(session: Session, audit: Audit, ranking: Ranking, mode: Mode) -> Changes:
    """Return what happens to which row.

    Args:
        session: the transaction.
        audit: whose training set it is.
        ranking: whose flags and suggestions count, unless decisions do.
        mode: decisions: what reviewers decided; drop: flagged samples are left out; correct: they
            get their suggested label.
    """
    statement = _decided(audit) if mode == "decisions" else _flagged(audit, ranking, mode)
    rows = session.execute(statement.execution_options(yield_per=_ROWS_PER_FETCH))
    return Changes(audit.num_train or 0, _read(rows))


def _read(rows: Iterable[Any]) -> Iterator[tuple[int, Change]]:
    for index, label, text, reviewer, decided_at in rows:
        kind: Kind = "drop" if label is None and text is None else "relabel"
        if text is not None:
            kind = "rewrite"
        yield index, Change(kind, label if text is None else text, reviewer, decided_at)


def _is_planted(audit: Audit) -> ColumnElement[bool]:
    """Tell whether what the audit judged is not what the file says."""
    has_planted = audit.request.get("plant_noise") is not None
    return and_(literal(has_planted), TrainingSample.is_noisy.is_(True))


def _decided(audit: Audit) -> Select[Any]:
    is_sample = and_(
        TrainingSample.audit_id == Decision.audit_id,
        TrainingSample.sample_index == Decision.sample_index,
    )
    # Who accepts the label that the sample has anyway changes nothing.
    is_changed = or_(
        and_(Decision.action == Action.DROP, ~_is_planted(audit)),
        and_(
            Decision.action == Action.ACCEPT,
            Decision.label.is_distinct_from(TrainingSample.given_label),
        ),
        Decision.action == Action.EDIT,
    )
    names = ("sample_index", "label", "text", "reviewer", "decided_at")
    columns: list[Any] = [getattr(Decision, name) for name in names]
    decided = select(*columns).join(TrainingSample, is_sample)
    return decided.where(Decision.audit_id == audit.id, is_changed)


def _flagged(audit: Audit, ranking: Ranking, mode: Mode) -> Select[Any]:
    label: Any = RankedSample.suggested_label if mode == "correct" else literal(None)
    nothing = literal(None)
    flagged: Select[Any] = (
        select(RankedSample.sample_index, label, nothing, nothing, nothing)
        .join(TrainingSample, is_sample_of(ranking))
        .where(RankedSample.ranking_id == ranking.id, RankedSample.flagged, ~_is_planted(audit))
    )
    if mode == "correct":
        flagged = flagged.where(
            RankedSample.suggested_label.is_not(None),
            RankedSample.suggested_label != RankedSample.given_label,
            ~TrainingSample.non_finite,
        )
    return flagged
