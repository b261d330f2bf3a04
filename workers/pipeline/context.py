"""What a stage works with, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.automatic import needs_split
from app.audits.models import Audit, Ranking
from app.audits.schemas import AuditRequest
from app.datasets.columns import DatasetLimits
from app.datasets.storage import cache_folder
from app.db import transaction
from app.settings import Settings
from app.work.claims import Claim
from app.work.keeping import may_tidy
from workers.lease import Hold
from workers.pipeline.artifacts import Artifacts
from workers.sources.hub import Hub
from workers.sources.objects import ObjectStore
from workers.sources.web import Web


@dataclass(frozen=True)
class StageContext:
    """One unit of one audit, or of one of its rankings, on this worker.

    Attributes:
        request: the audit's; of a later ranking with that ranking and its flag in place of the
            audit's own.
    """

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
    def has_validation(self) -> bool:
        """Whether there is a validation set: named, or taken from the training set."""
        return self.request.validation is not None or needs_split(self.request.stored())

    @property
    def num_probe_shards(self) -> int:
        """Into how many shards the probes were cut, 0 without any."""
        return int(self.provenance.get("num_probe_shards", 0))

    @property
    def cache_dir(self) -> Path:
        """Where resolved models and datasets are kept."""
        return cache_folder(self.settings.data_dir)

    @property
    def hub(self) -> Hub:
        """Where hf:// references are resolved."""
        token = self.settings.hub_token
        return Hub(
            endpoint=str(self.settings.hub_endpoint),
            cache_dir=self.cache_dir / "hub",
            token=token.get_secret_value() if token else None,
            networks=self.settings.fetch_networks,
        )

    @property
    def web(self) -> Web:
        """Where https:// references are fetched."""
        return Web(
            is_allowed=self.settings.https_datasets,
            networks=self.settings.fetch_networks,
            ca_file=self.settings.fetch_ca_file,
        )

    @property
    def store(self) -> ObjectStore:
        """Where s3:// references are fetched."""
        endpoint = self.settings.s3_endpoint
        access_key, secret_key = self.settings.s3_access_key, self.settings.s3_secret_key
        return ObjectStore(
            roots=self.settings.s3_roots,
            endpoint=str(endpoint).rstrip("/") if endpoint else None,
            region=self.settings.s3_region,
            access_key=access_key.get_secret_value() if access_key else None,
            secret_key=secret_key.get_secret_value() if secret_key else None,
        )

    def remove_scratch(self) -> None:
        """Remove what only the passes over the gradients needed.

        Not while a backup is taken: what it dumped may stand before this stage. Retention takes
        what is left.
        """
        with transaction(self.engine) as session:
            if may_tidy(session):
                self.artifacts.remove_scratch()

    @property
    def limits(self) -> DatasetLimits:
        """The largest dataset that is taken."""
        return DatasetLimits(
            max_rows=self.settings.max_rows,
            max_bytes=self.settings.max_upload_bytes,
            max_text_chars=self.settings.max_text_chars,
        )


@dataclass(frozen=True)
class StageOutput:
    """What a finished stage leaves in the database, in the transaction that finishes its unit.

    Attributes:
        result: kept with the unit.
        provenance: merged into the audit's.
        columns: of the row of the audit, or of the ranking, by name.
        summary: merged into the audit's.
        write: further writes of the stage, such as a COPY of results; done before that row is
            locked.
    """

    result: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Session], None] = lambda _: None
    seconds: float = 0.0
    stage: str = ""

    def save(self, owner: Audit | Ranking) -> None:
        """Set what the stage found; the caller holds the owner's lock and commits."""
        if isinstance(owner, Audit):
            owner.provenance = {**owner.provenance, **self.provenance}
            total = owner.timings.get(self.stage, 0.0) + self.seconds
            owner.timings = {**owner.timings, self.stage: round(total, 3)}
        else:
            owner.seconds = self.seconds
        for name, value in self.columns.items():
            setattr(owner, name, value)
        if self.summary:
            owner.summary = {**owner.summary, **self.summary}
