"""Queries on audits; the tenant is in every one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, select
from sqlalchemy.orm import Load, Session

from app.audits.filters import SuspectFilter, matching
from app.audits.models import (
    EVIDENCE,
    Audit,
    RankedSample,
    Ranking,
    TrainingSample,
    ValidationSample,
)
from app.decisions.models import Decision


def find_audit(
    session: Session,
    tenant: str,
    audit_id: str,
    *,
    lock: bool = False,
    lock_to_use: bool = False,
) -> Audit | None:
    """Return a tenant's audit.

    Args:
        session: the transaction.
        tenant: whose audits count.
        audit_id: which.
        lock: hold the row until the transaction ends, to delete it or to change what it is.
        lock_to_use: the same, but let others refer to the row.
    """
    statement = select(Audit).where(Audit.id == audit_id, Audit.tenant == tenant)
    if lock or lock_to_use:
        statement = statement.with_for_update(key_share=not lock)
    return session.scalars(statement).one_or_none()


def list_audits(
    session: Session,
    tenant: str,
    *,
    limit: int,
    before_id: str | None = None,
    state: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> list[Audit]:
    """Return a tenant's audits, the newest first, one more than `limit` when there are more."""
    statement = select(Audit).where(Audit.tenant == tenant)
    if before_id is not None:
        statement = statement.where(Audit.id < before_id)
    if state is not None:
        statement = statement.where(Audit.state == state)
    if model is not None:
        statement = statement.where(Audit.request["model"]["reference"].as_string() == model)
    if dataset is not None:
        statement = statement.where(Audit.request["train"]["reference"].as_string() == dataset)
    if created_after is not None:
        statement = statement.where(Audit.created_at >= created_after)
    if created_before is not None:
        statement = statement.where(Audit.created_at < created_before)
    return list(session.scalars(statement.order_by(Audit.id.desc()).limit(limit + 1)))


def uses_dataset(session: Session, tenant: str, reference: str) -> bool:
    """Return whether an audit that has not ended reads the dataset."""
    reads = Audit.request["train"]["reference"].as_string() == reference
    validates = Audit.request["validation"]["reference"].as_string() == reference
    tests = Audit.request["test"]["reference"].as_string() == reference
    statement = select(Audit.id).where(
        Audit.tenant == tenant, Audit.finished_at.is_(None), reads | validates | tests
    )
    return session.scalars(statement.limit(1)).first() is not None


def ranking_of(session: Session, tenant: str, audit_id: str) -> Ranking:
    """Return a finished audit's own ranking."""
    statement = select(Ranking).where(Ranking.audit_id == audit_id, Ranking.tenant == tenant)
    return session.scalars(statement.where(Ranking.is_own)).one()


def find_ranking(
    session: Session, tenant: str, audit_id: str, ranking_id: str, *, lock: bool = False
) -> Ranking | None:
    """Return a ranking of a tenant's audit."""
    statement = select(Ranking).where(
        Ranking.id == ranking_id, Ranking.audit_id == audit_id, Ranking.tenant == tenant
    )
    return session.scalars(statement.with_for_update() if lock else statement).one_or_none()


def list_rankings(
    session: Session, tenant: str, audit_id: str, *, limit: int, after_id: str | None = None
) -> list[Ranking]:
    """Return an audit's rankings, its own first, one more than `limit` when there are more.

    Ids sort by the time of their making, and the audit's own is made before the audit ends.
    """
    statement = select(Ranking).where(Ranking.audit_id == audit_id, Ranking.tenant == tenant)
    if after_id is not None:
        statement = statement.where(Ranking.id > after_id)
    return list(session.scalars(statement.order_by(Ranking.id).limit(limit + 1)))


def lock_unfinished_rankings(session: Session, audit_id: str) -> list[str]:
    """Lock all rankings of an audit and return the ids of those that have not ended."""
    statement = select(Ranking).where(Ranking.audit_id == audit_id).order_by(Ranking.id)
    rankings = session.scalars(statement.with_for_update())
    return [ranking.id for ranking in rankings if ranking.finished_at is None]


SuspectRow = Row[RankedSample, TrainingSample, Decision | None]


@dataclass(frozen=True)
class NamedSample:
    """A training sample's place in a ranking with the samples that it names.

    Attributes:
        validation: the validation samples, by index.
        training: the other training samples, by index.
        labels: the audit's classes; none for a causal language model.
    """

    row: SuspectRow
    validation: Mapping[int, ValidationSample]
    training: Mapping[int, TrainingSample]
    labels: Sequence[str]


def list_suspects(
    session: Session,
    ranking: Ranking,
    filters: SuspectFilter,
    *,
    limit: int,
    after_rank: int | None = None,
) -> Sequence[SuspectRow]:
    """Return ranked samples in order, one more than `limit` when there are more.

    The places are found first, so that nothing else is read of samples that are passed over.
    """
    places = matching(ranking, filters, RankedSample.rank)
    if after_rank is not None:
        places = places.where(RankedSample.rank > after_rank)
    if filters.said().keys() == {"decision"} and "none" in (filters.decision or ()):
        # Of so many samples in a row, enough are undecided: the others need no look.
        num_decided = select(Audit.num_decided).where(Audit.id == ranking.audit_id)
        last = (-1 if after_rank is None else after_rank) + limit + 1
        places = places.where(RankedSample.rank <= num_decided.scalar_subquery() + last)
    found = places.order_by(RankedSample.rank).limit(limit + 1).subquery()
    statement = _suspects(ranking).join(found, found.c.rank == RankedSample.rank)
    return session.execute(statement.order_by(RankedSample.rank)).all()


def _suspects(ranking: Ranking) -> Select[Any]:
    columns = (RankedSample, TrainingSample, Decision)
    everything = SuspectFilter()
    return matching(ranking, everything, *columns, with_sample=True, with_decision=True)


def find_sample(session: Session, ranking: Ranking, index: int) -> SuspectRow | None:
    """Return one training sample by its row in the training file, with the evidence."""
    statement = _suspects(ranking).where(RankedSample.sample_index == index)
    statement = statement.options(Load(TrainingSample).undefer_group(EVIDENCE))
    return session.execute(statement).one_or_none()


def training_samples(
    session: Session, audit_id: str, indices: Sequence[int]
) -> dict[int, TrainingSample]:
    """Return training samples by their rows."""
    statement = select(TrainingSample).where(
        TrainingSample.audit_id == audit_id, TrainingSample.sample_index.in_(indices)
    )
    return {sample.sample_index: sample for sample in session.scalars(statement)}


def validation_samples(
    session: Session, audit_id: str, indices: Sequence[int]
) -> dict[int, ValidationSample]:
    """Return validation samples by their rows."""
    statement = select(ValidationSample).where(
        ValidationSample.audit_id == audit_id, ValidationSample.sample_index.in_(indices)
    )
    return {sample.sample_index: sample for sample in session.scalars(statement)}
