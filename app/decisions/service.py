"""Decisions: made on samples or on a whole filter, previewed, listed, taken back.

Every writer holds the audit's row until it is committed. So two reviewers at once come one after
the other, and the second is told where the first was quicker.
"""

from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Engine, Select, func, select
from sqlalchemy.orm import Session

from app.audits import repository as audits
from app.audits.idempotency import KeyedCall
from app.audits.ranking_service import results_for
from app.audits.service import Results, existing
from app.db import new_id, transaction
from app.decisions import answers, repository
from app.decisions.models import Action, DecisionBatch
from app.decisions.schemas import ANONYMOUS, DecisionRequest, UndoRequest
from app.errors import Conflict, InvalidRequest, NotFound
from app.keys.service import Caller
from app.settings import Settings
from app.trail.service import TrailAction, record

NUM_NAMED = 10
MANY_SAMPLES = 10_000
_STEPS = (1, 2, 5)

log = structlog.get_logger()


@dataclass(frozen=True)
class Stored:
    """A batch, and whether an earlier call with the same key made it."""

    batch: DecisionBatch
    is_replay: bool = False


@dataclass(frozen=True)
class _Plan:
    """What a request comes to, inside the transaction.

    Attributes:
        samples: a query of those that it decides on.
        num_samples: that it names or that match.
        num_skipped: that it does not decide on.
    """

    results: Results
    reviewer: str
    samples: Select[Any]
    num_samples: int
    num_skipped: int


def decide(
    engine: Engine,
    settings: Settings,
    *,
    caller: Caller,
    audit_id: str,
    request: DecisionRequest,
    idempotency_key: str | None,
) -> Stored:
    """Store a decision on some samples, all of them or none.

    Raises:
        NotFound: there is no such audit or ranking, or it is another tenant's.
        Conflict: it has no results; or somebody else decided since; or the key's batch is gone.
        InvalidRequest: the field that is wrong, or a key that came with another body.
    """
    route = f"POST /v1/audits/{audit_id}/decisions"
    call = _keyed(request, caller, route, idempotency_key)
    with transaction(engine) as session:
        _hold(session, caller, audit_id)
        first = _first_answer(session, audit_id, call)
        if first is not None:
            return Stored(first, is_replay=True)
        plan = _plan(session, settings, caller=caller, audit_id=audit_id, request=request)
        if plan.num_skipped and request.indices is not None:
            raise _no_suggestion(session, plan, request)
        _check_conflicts(session, plan, request)
        audit = plan.results.audit
        batch = DecisionBatch(
            id=new_id("dcb"),
            audit_id=audit.id,
            tenant=audit.tenant,
            version=audit.decision_version + 1,
            ranking_id=plan.results.ranking.id,
            action=str(request.action),
            label=request.label,
            text=request.text,
            filter=request.filter.said() if request.filter is not None else None,
            reviewer=plan.reviewer,
            num_samples=plan.num_samples,
            num_changed=0,
            num_skipped=plan.num_skipped,
            created_at=session.scalars(select(func.clock_timestamp())).one(),
        )
        if call is not None:
            call.claim(session, batch.id)
        counts = repository.store(session, batch, plan.samples)
        batch.num_changed = counts.num_changed
        session.add(batch)
        audit.decision_version = batch.version
        audit.num_decided += counts.num_more
        audit.version += 1
        record(session, TrailAction.DECISION_MAKE, batch.id, tenant=audit.tenant)
    _tell_planner(engine, batch)
    log.info("decided", audit_id=audit_id, batch_id=batch.id, num_changed=batch.num_changed)
    return Stored(batch)


def preview(
    engine: Engine,
    settings: Settings,
    *,
    caller: Caller,
    audit_id: str,
    request: DecisionRequest,
) -> answers.DecisionPreview:
    """Return what a decision would come to, and store nothing.

    Raises:
        NotFound: there is no such audit or ranking, or it is another tenant's.
        Conflict: it has no results.
        InvalidRequest: the field that is wrong.
    """
    with Session(engine) as session:
        plan = _plan(session, settings, caller=caller, audit_id=audit_id, request=request)
        number = 0
        if request.as_of is not None:
            number, _ = _conflicts(session, plan, request.as_of)
        return answers.DecisionPreview(
            num_samples=plan.num_samples,
            num_skipped=plan.num_skipped,
            num_conflicts=number,
            decision_version=plan.results.audit.decision_version,
        )


def undo(
    engine: Engine,
    *,
    caller: Caller,
    audit_id: str,
    batch_id: str,
    request: UndoRequest,
    idempotency_key: str | None,
) -> Stored:
    """Put back what stood before a batch, but for samples that were decided again since.

    Raises:
        NotFound: there is no such audit or batch, or it is another tenant's.
        Conflict: it was undone already.
        InvalidRequest: a key that came with another body.
    """
    route = f"POST /v1/audits/{audit_id}/decisions/{batch_id}/undo"
    call = _keyed(request, caller, route, idempotency_key)
    with transaction(engine) as session:
        _hold(session, caller, audit_id)
        batch = repository.find_batch(session, caller.tenant, audit_id, batch_id)
        if batch is None:
            raise NotFound(f"There is no batch of decisions {batch_id!r} of an audit {audit_id!r}.")
        if call is not None and not call.claim(session, batch.id):
            call.first_answer(session)
            return Stored(batch, is_replay=True)
        if batch.undone_at is not None:
            raise Conflict(
                f"{batch.undone_by} took this batch back already, at {batch.undone_at:%H:%M:%S} "
                f"UTC on {batch.undone_at:%Y-%m-%d}.",
                undone_at=batch.undone_at.isoformat(),
            )
        audit = existing(audits.find_audit(session, caller.tenant, audit_id), audit_id)
        audit.decision_version += 1
        audit.version += 1
        batch.undone_at = session.scalars(select(func.clock_timestamp())).one()
        batch.undone_by = _reviewer(caller, request.reviewer)
        batch.undone_version = audit.decision_version
        counts = repository.take_back(
            session, batch, version=audit.decision_version, reviewer=batch.undone_by
        )
        audit.num_decided += counts.num_more
        batch.num_kept = repository.num_touched(session, batch) - counts.num_changed
        record(session, TrailAction.DECISION_UNDO, batch.id, tenant=audit.tenant)
    _tell_planner(engine, batch)
    log.info("decision_undone", audit_id=audit_id, batch_id=batch_id)
    return Stored(batch)


def list_batches(
    engine: Engine, *, tenant: str, audit_id: str, limit: int, before_version: int | None
) -> list[DecisionBatch]:
    """Return batches, the newest first, one more than `limit` when there are more.

    Raises:
        NotFound: there is no such audit, or it is another tenant's.
    """
    with Session(engine) as session:
        existing(audits.find_audit(session, tenant, audit_id), audit_id)
        return repository.list_batches(
            session, tenant, audit_id, limit=limit, before_version=before_version
        )


def precision(results: Results) -> answers.Precision:
    """Return which share of the decided samples among the k lowest is wrong, for rising k."""
    num_train = results.audit.num_train or 0
    ks = [
        step * 10**power
        for power in range(1, len(str(num_train)))
        for step in _STEPS
        if step * 10**power <= num_train
    ]
    counted = repository.wrong_among_lowest(results.session, results.ranking, ks)
    return answers.Precision(
        ranking_id=results.ranking.id,
        at=[
            answers.PrecisionAt(
                k=k,
                num_decided=decided,
                num_wrong=wrong,
                precision=wrong / decided if decided else None,
            )
            for k, (decided, wrong) in zip(ks, counted, strict=True)
        ],
    )


def _tell_planner(engine: Engine, batch: DecisionBatch) -> None:
    if batch.num_samples >= MANY_SAMPLES:
        with transaction(engine) as session:
            repository.refresh_statistics(session)


def _hold(session: Session, caller: Caller, audit_id: str) -> None:
    existing(audits.find_audit(session, caller.tenant, audit_id, lock_to_use=True), audit_id)


def _keyed(
    request: DecisionRequest | UndoRequest, caller: Caller, route: str, key: str | None
) -> KeyedCall | None:
    if key is None:
        return None
    return KeyedCall.of(request, tenant=caller.tenant, route=route, key=key, thing="decision")


def _first_answer(session: Session, audit_id: str, call: KeyedCall | None) -> DecisionBatch | None:
    """Return the batch that a key was given before; None for a key that is new."""
    batch_id = call.first_answer(session) if call is not None else None
    if call is None or batch_id is None:
        return None
    batch = repository.find_batch(session, call.tenant, audit_id, batch_id)
    if batch is None:
        raise call.is_gone(batch_id)
    return batch


def _reviewer(caller: Caller, said: str | None) -> str:
    return caller.key_name or said or ANONYMOUS


def _plan(
    session: Session,
    settings: Settings,
    *,
    caller: Caller,
    audit_id: str,
    request: DecisionRequest,
) -> _Plan:
    results = results_for(
        session, tenant=caller.tenant, audit_id=audit_id, ranking_id=request.ranking_id
    )
    _check(results, settings, request)
    samples = repository.samples_of(
        results.ranking, indices=request.indices, filters=request.filter
    )
    number, num_skipped = repository.count(session, samples), 0
    if request.action == Action.ACCEPT:
        samples = samples.where(repository.has_suggestion(results.ranking))
        num_skipped = number - repository.count(session, samples)
    return _Plan(results, _reviewer(caller, request.reviewer), samples, number, num_skipped)


def _check(results: Results, settings: Settings, request: DecisionRequest) -> None:
    """Check what the request says against the audit."""
    audit = results.audit
    labels: list[str] = audit.summary["labels"]
    if request.label is not None and request.label not in labels:
        known = f"it has {', '.join(labels)}" if labels else "it has none: edit takes a text"
        raise InvalidRequest.at("#/label", f"The audit has no class {request.label!r}; {known}.")
    if request.text is not None and labels:
        raise InvalidRequest.at(
            "#/text", "This is an audit of a classifier, where edit takes a label, not a text."
        )
    if len(request.text or "") > settings.max_text_chars:
        raise InvalidRequest.at(
            "#/text", f"The text has more than {settings.max_text_chars:,} characters."
        )
    for place, index in enumerate(request.indices or ()):
        if index >= (audit.num_train or 0):
            raise InvalidRequest.at(
                f"#/indices/{place}",
                f"The training set has no sample {index}; it has {audit.num_train}, counted from "
                "0. Nothing was stored.",
            )
    if request.as_of is not None and request.as_of > audit.decision_version:
        raise InvalidRequest.at(
            "#/as_of",
            f"The audit's decision_version is {audit.decision_version}, so nobody saw "
            f"{request.as_of}.",
        )


def _no_suggestion(session: Session, plan: _Plan, request: DecisionRequest) -> InvalidRequest:
    ranking = plan.results.ranking
    named = repository.samples_of(ranking, indices=request.indices, filters=None)
    without = named.where(~repository.has_suggestion(ranking))
    first = repository.first_indices(session, without, NUM_NAMED)
    return InvalidRequest.at(
        "#/indices",
        f"{_number(plan.num_skipped, 'sample')} of these {plan.num_samples:,} "
        f"{'has' if plan.num_skipped == 1 else 'have'} no suggested label to accept "
        f"({_listed(first, plan.num_skipped)}); nothing was stored. Leave them out, or decide "
        "keep, drop or edit on them.",
    )


def _check_conflicts(session: Session, plan: _Plan, request: DecisionRequest) -> None:
    if request.as_of is None:
        return
    number, rows = _conflicts(session, plan, request.as_of)
    if not number:
        return
    first = [row.sample_index for row in rows]
    raise Conflict(
        f"{_number(number, 'sample')} of these {'was' if number == 1 else 'were'} decided by "
        f"somebody else since you looked ({_listed(first, number)}); nothing was stored. Look at "
        f"them again, and send as_of {plan.results.audit.decision_version} to decide all the same.",
        num_conflicts=number,
        conflicts=[
            {
                "index": row.sample_index,
                "reviewer": row.changed_by,
                "version": row.changed_version,
            }
            for row in rows
        ],
        decision_version=plan.results.audit.decision_version,
    )


def _number(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _listed(indices: list[int], number: int) -> str:
    return ", ".join(map(str, indices)) + (", …" if number > len(indices) else "")


def _conflicts(session: Session, plan: _Plan, as_of: int) -> tuple[int, Any]:
    return repository.conflicts(
        session,
        plan.results.audit.id,
        plan.samples,
        as_of=as_of,
        reviewer=plan.reviewer,
        limit=NUM_NAMED,
    )
