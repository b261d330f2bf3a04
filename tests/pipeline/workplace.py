"""One worker of one service, in this process: submit audits, and work on them unit by unit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import undefer_group

from app.audits.models import (
    EVIDENCE,
    Audit,
    RankedSample,
    Ranking,
    TrainingSample,
    ValidationSample,
)
from app.audits.schemas import AuditRequest
from app.db import new_id, transaction
from app.settings import Settings
from app.work import repository as work
from app.work.claims import Claim
from app.work.models import Stage, UnitState, WorkUnit
from tests.factories import TENANT
from tests.pipeline.tiny import reviews, write_table
from workers.lease import Draining, Hold
from workers.pipeline import runtime
from workers.pipeline.artifacts import Artifacts
from workers.tasks import execute


@dataclass(frozen=True)
class Workplace:
    """The database, the settings and the folder of the user's files."""

    engine: Engine
    settings: Settings
    files: Path

    def with_settings(self, **changes: Any) -> "Workplace":
        """The same service, set up otherwise."""
        return Workplace(self.engine, self.settings.model_copy(update=changes), self.files)

    def table(self, name: str, columns: dict[str, Any]) -> dict[str, Any]:
        """Write a table and return the request's part that names it."""
        return {"reference": f"file://{write_table(self.files / f'{name}.parquet', columns)}"}

    def reviews(self, *, num_train: int = 60, num_validation: int = 12) -> dict[str, Any]:
        """Write both sets of reviews and return the request's parts that name them."""
        return {
            "train": self.table("train", reviews(num_train, seed=0)),
            "validation": self.table("validation", reviews(num_validation, seed=1)),
        }

    def submit(
        self,
        model: Path,
        *,
        adapter: Path | None = None,
        target_modules: list[str] | None = None,
        source: dict[str, Any] | None = None,
        **request: Any,
    ) -> str:
        """Store an audit as the API does and return its id; what ranks is fixed where not said.

        `source` is what else the request says of the model.
        """
        source = {
            "reference": f"file://{model}",
            "adapter": f"file://{adapter}" if adapter else None,
            "target_modules": target_modules,
            **(source or {}),
        }
        fixed = {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"}
        body = AuditRequest.model_validate(
            {
                "flag": {"fraction": 0.2},
                "max_tokens": 64,
                **request,
                "ranking": {**fixed, **request.get("ranking", {})},
                "model": source,
            }
        )
        with transaction(self.engine) as session:
            audit = Audit(id=new_id("aud"), tenant=TENANT, request=body.stored())
            session.add(audit)
            session.flush()
            work.add_units(session, audit.id, Stage.PREPARE)
            return audit.id

    def claim(self, audit_id: str) -> Claim | None:
        """Take the audit's next unit."""
        with transaction(self.engine) as session:
            unit_id = session.scalars(
                select(WorkUnit.id)
                .where(WorkUnit.audit_id == audit_id, WorkUnit.state == UnitState.READY)
                .order_by(WorkUnit.position)
            ).first()
        if unit_id is None:
            return None
        return work.claim(
            self.engine, unit_id, owner="worker", lease_seconds=self.settings.lease_seconds
        )

    def claim_stage(self, audit_id: str, stage: Stage) -> Claim:
        """Work until a unit of a stage can be taken, and take it."""
        while claim := self.claim(audit_id):
            if claim.stage is stage:
                return claim
            execute(self.engine, self.settings, claim)
        audit = self.audit(audit_id)
        raise AssertionError(f"ended before {stage}: {audit.error_code} {audit.error_message}")

    def execute(self, claim: Claim) -> list[str]:
        """Do one unit."""
        return execute(self.engine, self.settings, claim)

    def finish(self, audit_id: str) -> Audit:
        """Work until nothing is left of an audit."""
        while claim := self.claim(audit_id):
            self.execute(claim)
        return self.audit(audit_id)

    def succeed(self, audit_id: str) -> Audit:
        """Work until nothing is left of an audit, which must be done well."""
        audit = self.finish(audit_id)
        assert audit.state == "succeeded", (audit.error_code, audit.error_message)
        return audit

    def expire(self, claim: Claim) -> Claim:
        """Let a unit's lease run out and take it as another worker."""
        heir = None
        while heir is None:  # a heartbeat may come between
            with transaction(self.engine) as session:
                session.execute(
                    update(WorkUnit)
                    .where(WorkUnit.id == claim.unit_id)
                    .values(lease_until=func.now() - timedelta(seconds=1))
                )
            heir = work.claim(self.engine, claim.unit_id, owner="another", lease_seconds=60)
        return heir

    def audit(self, audit_id: str) -> Audit:
        with transaction(self.engine) as session:
            return session.get_one(Audit, audit_id)

    def unit(self, claim: Claim) -> WorkUnit:
        with transaction(self.engine) as session:
            return session.get_one(WorkUnit, claim.unit_id)

    def units(self, audit_id: str) -> list[WorkUnit]:
        with transaction(self.engine) as session:
            return list(session.scalars(select(WorkUnit).where(WorkUnit.audit_id == audit_id)))

    def artifacts(self, audit_id: str) -> Artifacts:
        return Artifacts(self.settings.data_dir, audit_id)

    def training_rows(self, audit_id: str) -> list[TrainingSample]:
        """The training samples in the order of the file."""
        statement = select(TrainingSample).where(TrainingSample.audit_id == audit_id)
        statement = statement.options(undefer_group(EVIDENCE))
        with transaction(self.engine) as session:
            return list(session.scalars(statement.order_by(TrainingSample.sample_index)))

    def validation_rows(self, audit_id: str) -> list[ValidationSample]:
        statement = select(ValidationSample).where(ValidationSample.audit_id == audit_id)
        with transaction(self.engine) as session:
            return list(session.scalars(statement.order_by(ValidationSample.sample_index)))

    def ranked_rows(self, audit_id: str) -> list[RankedSample]:
        """The ranking from the most suspect on."""
        statement = (
            select(RankedSample)
            .join(Ranking, Ranking.id == RankedSample.ranking_id)
            .where(Ranking.audit_id == audit_id)
        )
        with transaction(self.engine) as session:
            return list(session.scalars(statement.order_by(RankedSample.rank)))


def results(audit: Audit) -> dict[str, str]:
    """Return the SHA-256 of every result file."""
    return {name: file["sha256"] for name, file in audit.summary["files"].items()}


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, *, tick: int) -> Iterator[None]:
    """Let the worker be stopped at a tick of any kind, counted from 1, and another one go on."""
    count = 0
    original = Hold._report

    def counting(self: Hold, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == tick:
            raise Draining
        original(self, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(Hold, "_report", counting)
        yield
    runtime._loaded.clear()  # the next worker is another process
