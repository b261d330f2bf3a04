"""Where things stand that somebody watches, read for all of them at once."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.audits.assemble import audit_links, ranking_links
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.experiments.standing import Standing
from app.live.answers import Progress
from app.work.models import Stage


class Kind(StrEnum):
    """What can be watched."""

    AUDIT = "audit"
    RANKING = "ranking"
    EXPERIMENT = "experiment"


class Thing(NamedTuple):
    """One row, or set of rows, that is watched."""

    kind: Kind
    id: str


@dataclass(frozen=True)
class Snapshot:
    """Where a thing stands.

    Attributes:
        progress: as listeners are told.
        links: the paths that make sense now.
    """

    progress: Progress
    links: dict[str, str]

    @property
    def version(self) -> int:
        """The row's version, which rises with every change."""
        return self.progress.version

    @property
    def is_final(self) -> bool:
        """Whether the thing has ended."""
        return self.progress.done


def read_snapshots(engine: Engine, things: Collection[Thing]) -> dict[Thing, Snapshot]:
    """Return where things stand, by one query for each kind; those that are gone are missing."""
    ids: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    for thing in things:
        ids[thing.kind].append(thing.id)
    readers = {Kind.AUDIT: _audits, Kind.RANKING: _rankings, Kind.EXPERIMENT: _experiments}
    with Session(engine) as session:
        return {
            Thing(kind, snapshot.progress.id): snapshot
            for kind, wanted in ids.items()
            if wanted
            for snapshot in readers[kind](session, wanted)
        }


def _audits(session: Session, ids: list[str]) -> Iterator[Snapshot]:
    columns = (
        *(Audit.id, Audit.state, Audit.stage, Audit.version),
        *(Audit.progress, Audit.waiting, Audit.samples_per_second, Audit.eta_seconds),
    )
    for row in session.execute(select(*columns).where(Audit.id.in_(ids))):
        state = AuditState(row.state)
        progress = Progress(
            id=row.id,
            state=state,
            done=state.is_final,
            stage=Stage(row.stage) if row.stage else None,
            progress=row.progress,
            waiting=row.waiting,
            samples_per_second=row.samples_per_second,
            eta_seconds=row.eta_seconds,
            version=row.version,
        )
        yield Snapshot(progress, audit_links(row.id, state))


def _rankings(session: Session, ids: list[str]) -> Iterator[Snapshot]:
    columns = (
        *(Ranking.id, Ranking.audit_id, Ranking.state),
        *(Ranking.version, Ranking.progress, Ranking.waiting),
    )
    for row in session.execute(select(*columns).where(Ranking.id.in_(ids))):
        state = RankingState(row.state)
        progress = Progress(
            id=row.id,
            state=state,
            done=state.is_final,
            progress=row.progress,
            waiting=row.waiting,
            version=row.version,
        )
        yield Snapshot(progress, ranking_links(row, state))


def _experiments(session: Session, ids: list[str]) -> Iterator[Snapshot]:
    columns = (Audit.experiment_id, Audit.state, Audit.version, Audit.progress)
    audits: dict[str, list[Any]] = {}
    for row in session.execute(select(*columns).where(Audit.experiment_id.in_(ids))):
        audits.setdefault(row.experiment_id, []).append(row)
    for experiment_id, rows in audits.items():
        standing = Standing(experiment_id, rows)
        progress = Progress(
            id=experiment_id,
            state=standing.state,
            done=standing.state.is_final,
            progress=standing.progress,
            version=standing.version,
        )
        yield Snapshot(progress, standing.links)
