"""What a stage works with, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.audits.schemas import AuditRequest
from app.datasets.columns import DatasetLimits
from app.settings import Settings
from app.work.repository import Claim
from workers.lease import Hold
from workers.pipeline.artifacts import Artifacts
from workers.sources.hub import Hub


@dataclass(frozen=True)
class StageContext:
    """One unit of one audit, on this worker."""

    engine: Engine
    settings: Settings
    claim: Claim
    hold: Hold
    request: AuditRequest
    provenance: dict[str, Any]
    tenant: str

    @property
    def artifacts(self) -> Artifacts:
        """The audit's files."""
        return Artifacts(self.settings.data_dir, self.claim.audit_id)

    @property
    def cache_dir(self) -> Path:
        """Where resolved models and datasets are kept."""
        return self.settings.data_dir / "cache"

    @property
    def hub(self) -> Hub:
        """Where hf:// references are resolved."""
        token = self.settings.hub_token
        return Hub(
            endpoint=str(self.settings.hub_endpoint),
            cache_dir=self.cache_dir / "hub",
            token=token.get_secret_value() if token else None,
        )

    @property
    def limits(self) -> DatasetLimits:
        """The largest dataset that is taken."""
        return DatasetLimits(
            max_rows=self.settings.max_rows, max_text_chars=self.settings.max_text_chars
        )


@dataclass(frozen=True)
class StageOutput:
    """What a finished stage leaves in the database, in the transaction that finishes its unit.

    Attributes:
        result: kept with the unit.
        provenance: merged into the audit's.
        columns: of the audit's row, by name.
        summary: merged into the audit's.
        write: further writes of the stage, such as a COPY of results; done before the audit's
            row is locked.
    """

    result: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Session], None] = lambda _: None
    seconds: float = 0.0
    stage: str = ""

    def save(self, audit: Audit) -> None:
        """Set what the stage found; the caller holds the audit's lock and commits."""
        audit.provenance = {**audit.provenance, **self.provenance}
        total = audit.timings.get(self.stage, 0.0) + self.seconds
        audit.timings = {**audit.timings, self.stage: round(total, 3)}
        for name, value in self.columns.items():
            setattr(audit, name, value)
        if self.summary:
            audit.summary = {**audit.summary, **self.summary}
