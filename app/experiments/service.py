"""Experiments: submit, look at, cancel, remove."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import Engine, func
from sqlalchemy.orm import Session

from app.audits.checks import check_request, knows_noise, missing_upload, uploads_of
from app.audits.folders import audit_folder
from app.audits.idempotency import KeyedCall
from app.audits.models import Audit, AuditState
from app.audits.repository import lock_unfinished_rankings
from app.audits.schemas import AuditRequest, FineTune, PlantNoise
from app.datasets.repository import keep_datasets
from app.db import new_id, transaction
from app.errors import Conflict, InvalidRequest, NotFound
from app.experiments import repository
from app.experiments.models import Experiment, ExperimentState
from app.experiments.rows import Cell
from app.experiments.schemas import ExperimentRequest
from app.experiments.standing import Standing
from app.limits.quotas import check_audits
from app.settings import Settings
from app.shared_files import remove_folder
from app.storage import require_room
from app.trail.service import TrailAction, record
from app.work.leftovers import note_leftover
from app.work.models import Stage
from app.work.repository import add_units, request_cancel
from app.work.states import enter_state

SUBMIT_ROUTE = "POST /v1/experiments"
RETRY_SECONDS = 15

log = structlog.get_logger()


@dataclass(frozen=True)
class ExperimentWithAudits:
    """An experiment and the audits that it is made of, in their order: by task, then by seed."""

    experiment: Experiment
    audits: Sequence[Audit]

    @property
    def standing(self) -> Standing:
        """Where it stands, as its audits tell."""
        return Standing(self.experiment.id, self.audits)

    @property
    def state(self) -> ExperimentState:
        """The state that its audits make."""
        return self.standing.state

    @property
    def version(self) -> int:
        """A number that rises whenever something changes."""
        return self.standing.version

    @property
    def finished_at(self) -> datetime | None:
        """When the last audit ended."""
        times = [audit.finished_at for audit in self.audits]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(times) else None

    def cells(self) -> list[tuple[Cell, Audit]]:
        """Return the audits with their tasks and seeds."""
        seeds: list[int] = self.experiment.request["seeds"]
        tasks = self.experiment.request["tasks"]
        cells = []
        for audit in self.audits:
            task_number, seed_number = divmod(audit.experiment_position or 0, len(seeds))
            task = tasks[task_number]
            cell = Cell(task["name"], task["model"]["reference"], seeds[seed_number])
            cells.append((cell, audit))
        return cells


@dataclass(frozen=True)
class Submission:
    """An accepted experiment.

    Attributes:
        made: the experiment.
        unit_ids: units that are ready to be sent.
        is_replay: whether an earlier call with the same key made it.
    """

    made: ExperimentWithAudits
    unit_ids: list[str]
    is_replay: bool


def submit(
    engine: Engine,
    settings: Settings,
    *,
    tenant: str,
    request: ExperimentRequest,
    idempotency_key: str | None,
) -> Submission:
    """Accept an experiment: its row, all its audits and its key in one transaction.

    Raises:
        InvalidRequest: the field that is wrong, or a key that came with another body.
        Conflict: the key's experiment was deleted.
        QuotaExceeded: the tenant may not submit as many audits now.
        StorageFull: the data directory has no room.
    """
    call = None
    if idempotency_key is not None:
        call = KeyedCall.of(
            request, tenant=tenant, route=SUBMIT_ROUTE, key=idempotency_key, thing="experiment"
        )
        with Session(engine, expire_on_commit=False) as session:
            first = _first_answer(session, call)
        if first is not None:
            return Submission(first, [], is_replay=True)
    require_room(settings)
    checked = [
        _check_task(engine, settings, tenant, request, place) for place in range(len(request.tasks))
    ]
    experiment = Experiment(
        id=new_id("exp"), tenant=tenant, request=request.stored(), metadata_=request.metadata
    )
    audits = [
        _new_audit(experiment, _with_seed(audit, seed), position=number)
        for number, (audit, seed) in enumerate(
            (audit, seed) for audit in checked for seed in request.seeds
        )
    ]
    with transaction(engine) as session:
        if call is not None and not call.claim(session, experiment.id):
            first = _first_answer(session, call)
            if first is not None:
                return Submission(first, [], is_replay=True)
        check_audits(session, settings, tenant=tenant, num_new=len(audits))
        _keep_uploads(session, tenant, checked)
        session.add(experiment)
        record(session, TrailAction.EXPERIMENT_SUBMIT, experiment.id, tenant=tenant)
        session.flush()
        session.add_all(audits)
        session.flush()
        unit_ids = [
            unit_id for audit in audits for unit_id in add_units(session, audit.id, Stage.PREPARE)
        ]
    log.info("experiment_accepted", experiment_id=experiment.id, num_audits=len(audits))
    return Submission(ExperimentWithAudits(experiment, audits), unit_ids, is_replay=False)


def _first_answer(session: Session, call: KeyedCall) -> ExperimentWithAudits | None:
    """Return the experiment that a key was given before; None for a key that is new."""
    experiment_id = call.first_answer(session)
    if experiment_id is None:
        return None
    experiment = repository.find_experiment(session, call.tenant, experiment_id)
    if experiment is None:
        raise call.is_gone(experiment_id)
    return _with_audits(session, experiment)


def _check_task(
    engine: Engine, settings: Settings, tenant: str, request: ExperimentRequest, place: int
) -> AuditRequest:
    """Check one task's references and columns, which no seed changes."""
    audit = request.audit_request(request.tasks[place], request.seeds[0])
    try:
        checked = check_request(engine, settings, tenant=tenant, request=audit)
    except InvalidRequest as error:
        (item,) = error.extras["errors"]
        raise InvalidRequest.at(_pointer(place, item["pointer"]), item["detail"]) from error
    if not knows_noise(checked):
        raise InvalidRequest.at(
            "#/noise_fraction",
            f"The noise in {request.tasks[place].name!r} is not known, so there is nothing to "
            "compare with. Give noise_fraction, or name the column in train.columns.noise.",
        )
    return checked


def _pointer(place: int, pointer: str) -> str:
    """Return the experiment's field for a field of an audit of one of its tasks."""
    field = pointer.removeprefix("#/").partition("/")[0]
    if field in {"plant_noise", "verify"}:  # the arm oracle needs known noise
        return "#/noise_fraction"
    return f"#/tasks/{place}{pointer.removeprefix('#')}"


def _with_seed(audit: AuditRequest, seed: int) -> AuditRequest:
    """Return an audit with another seed everywhere."""

    def seeded(part: FineTune | PlantNoise | None) -> FineTune | PlantNoise | None:
        return part.model_copy(update={"seed": seed}) if part is not None else None

    verify = audit.verify
    return audit.model_copy(
        update={
            "fine_tune": seeded(audit.fine_tune),
            "plant_noise": seeded(audit.plant_noise),
            "verify": verify.model_copy(update={"seeds": [seed]}) if verify is not None else None,
            "seed": seed,
        }
    )


def _new_audit(experiment: Experiment, request: AuditRequest, *, position: int) -> Audit:
    audit = Audit(
        id=new_id("aud"),
        tenant=experiment.tenant,
        request=request.stored(),
        metadata_={},
        state_times={},
        version=0,
        progress=0.0,
        experiment_id=experiment.id,
        experiment_position=position,
    )
    enter_state(audit, AuditState.QUEUED)
    return audit


def _keep_uploads(session: Session, tenant: str, tasks: Sequence[AuditRequest]) -> None:
    """Hold the uploads until the audits are committed; from then on these protect them."""
    pointer_of = {
        dataset_id: _pointer(place, pointer)
        for place, audit in enumerate(tasks)
        for dataset_id, pointer in uploads_of(audit).items()
    }
    kept = keep_datasets(session, tenant, pointer_of.keys())
    for dataset_id, pointer in pointer_of.items():
        if dataset_id not in kept:
            raise missing_upload(pointer, dataset_id)


def get_experiment(
    session: Session, *, tenant: str, experiment_id: str, with_summaries: bool = False
) -> ExperimentWithAudits:
    """Return a tenant's experiment.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    experiment = _existing(
        repository.find_experiment(session, tenant, experiment_id), experiment_id
    )
    return _with_audits(session, experiment, with_summaries=with_summaries)


def with_audits(session: Session, experiments: Sequence[Experiment]) -> list[ExperimentWithAudits]:
    """Return experiments with their audits."""
    audits = repository.audits_of(session, [experiment.id for experiment in experiments])
    return [ExperimentWithAudits(each, audits[each.id]) for each in experiments]


def _with_audits(
    session: Session, experiment: Experiment, *, with_summaries: bool = False, lock: bool = False
) -> ExperimentWithAudits:
    audits = repository.audits_of(
        session, [experiment.id], with_summaries=with_summaries, lock=lock
    )
    return ExperimentWithAudits(experiment, audits[experiment.id])


def cancel(engine: Engine, *, tenant: str, experiment_id: str) -> ExperimentWithAudits:
    """Ask all audits that have not ended to end; asking again changes nothing.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it has ended otherwise.
    """
    with transaction(engine) as session:
        experiment = _existing(
            repository.find_experiment(session, tenant, experiment_id, lock=True), experiment_id
        )
        found = _with_audits(session, experiment, lock=True)
        if found.state in {ExperimentState.SUCCEEDED, ExperimentState.FAILED}:
            raise Conflict(
                f"The experiment has {found.state.value} and cannot be cancelled any more.",
                state=found.state.value,
            )
        if found.state is ExperimentState.RUNNING:
            if experiment.cancel_requested_at is None:
                experiment.cancel_requested_at = func.now()
                record(session, TrailAction.EXPERIMENT_CANCEL, experiment.id, tenant=tenant)
            for audit in found.audits:
                if not AuditState(audit.state).is_final:
                    request_cancel(session, audit)
            session.flush()
            for row in (experiment, *found.audits):
                session.refresh(row)
            log.info("cancel_requested", experiment_id=experiment.id)
        return found


def delete(engine: Engine, settings: Settings, *, tenant: str, experiment_id: str) -> None:
    """Remove an ended experiment with its audits and their files.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it has not ended, or a ranking of one of its audits has not.
    """
    with transaction(engine) as session:
        experiment = _existing(
            repository.find_experiment(session, tenant, experiment_id, lock=True), experiment_id
        )
        found = _with_audits(session, experiment, lock=True)
        if not found.state.is_final:
            raise Conflict(
                "The experiment is running. Cancel it and wait for its end, then delete it.",
                state=found.state.value,
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        for audit in found.audits:
            if unfinished := lock_unfinished_rankings(session, audit.id):
                raise Conflict(
                    f"Ranking {unfinished[0]} of the audit {audit.id} has not ended. Wait for its "
                    "end or delete it, then delete the experiment.",
                    state=found.state.value,
                    headers={"Retry-After": str(RETRY_SECONDS)},
                )
        audit_ids = [audit.id for audit in found.audits]
        for audit_id in audit_ids:
            note_leftover(session, settings, audit_folder(settings.data_dir, audit_id))
        session.delete(experiment)  # the database removes its audits with it
        record(session, TrailAction.EXPERIMENT_DELETE, experiment_id, tenant=tenant)
    for audit_id in audit_ids:
        remove_folder(audit_folder(settings.data_dir, audit_id))
    log.info("experiment_deleted", experiment_id=experiment_id)


def results_of(session: Session, *, tenant: str, experiment_id: str) -> ExperimentWithAudits:
    """Return an experiment whose audits have ended, with what they found.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: it has not ended, or no audit of it has succeeded.
    """
    found = get_experiment(session, tenant=tenant, experiment_id=experiment_id)
    if not found.state.is_final:
        ended = sum(AuditState(audit.state).is_final for audit in found.audits)
        raise Conflict(
            f"The experiment is running and has no results yet: {ended} of {len(found.audits)} "
            "audits have ended.",
            state=found.state.value,
            headers={"Retry-After": str(RETRY_SECONDS)},
        )
    if all(audit.state != AuditState.SUCCEEDED for audit in found.audits):
        reason = next((audit.error_message for audit in found.audits if audit.error_message), None)
        raise Conflict(
            "No audit of the experiment has succeeded, so there are no results."
            + (f" The first failed: {reason}" if reason else ""),
            state=found.state.value,
        )
    session.expire_all()
    return get_experiment(session, tenant=tenant, experiment_id=experiment_id, with_summaries=True)


def _existing(experiment: Experiment | None, experiment_id: str) -> Experiment:
    if experiment is None:
        raise NotFound(f"There is no experiment {experiment_id!r}.")
    return experiment
