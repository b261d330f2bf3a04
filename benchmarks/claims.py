"""What the database does for workers: claims, signs of life and ends of units a second.

One audit has some thousand shards in an embedded PostgreSQL. Some processes, each with connections
of its own, claim them one after the other, renew each claim once, and finish it, as workers do but
without any work. Client and server share this machine, so that a server of its own does more. What
is told of a call is the time of the quickest tenth, which nothing else on the machine held up.

    .venv/bin/python -m benchmarks.claims [--units 1000 10000] [--claimers 1 4]
"""

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, func, insert

import app.tables  # noqa: F401  registers every table
from app.audits.models import Audit
from app.audits.schemas import AuditRequest
from app.db import make_engine, new_id, transaction
from app.embedded import embedded_postgres
from app.migrate import migrate
from app.work import repository as work
from app.work.fairness import claim_in_turn
from app.work.models import Stage, WorkUnit

LEASE_SECONDS = 600
QUICKEST = 0.1
REQUEST = {
    "model": {"reference": "hf://lab/model"},
    "train": {"reference": "hf://datasets/lab/films@main?split=train"},
    "validation": {"reference": "hf://datasets/lab/films@main?split=validation"},
    "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
    "flag": {"fraction": 0.1},
}


@dataclass(frozen=True)
class Load:
    """What one measurement found.

    Attributes:
        units: of the audit's stage.
        claimers: processes at once.
        claim: seconds that a claim takes, as a worker sees it.
        renew: that a sign of life takes, with a report of the audit's progress.
        beat: that one takes without a report.
        complete: that the end of a unit takes.
        rate: units claimed, renewed and finished a second, all claimers together.
    """

    units: int
    claimers: int
    claim: float
    renew: float
    beat: float
    complete: float
    rate: float


def measure(url: str, *, units: int, claimers: int, seconds: float = 6.0) -> Load:
    """Let some processes take the units of a new audit for a while."""
    engine = make_engine(url)
    audit_id, first = _make_audit(engine, units)
    arguments = [(url, first, seconds)] * claimers
    with multiprocessing.get_context("spawn").Pool(claimers) as pool:
        pool.starmap(_work, [(url, first, 0.2)] * claimers, chunksize=1)  # connects
        started = time.perf_counter()
        parts = pool.starmap(_work, arguments, chunksize=1)
        elapsed = time.perf_counter() - started
    with transaction(engine) as session:
        session.delete(session.get_one(Audit, audit_id))
    engine.dispose()
    done = [times for part in parts for times in part]
    calls = (np.quantile(column, QUICKEST) for column in zip(*done, strict=True))
    claim, renew, beat, complete = map(float, calls)
    return Load(units, claimers, claim, renew, beat, complete, rate=len(done) / elapsed)


def _make_audit(engine: Engine, units: int) -> tuple[str, str]:
    """Store an audit whose gradients are at work, and return its id and a unit's."""
    body = AuditRequest.model_validate(REQUEST)
    with transaction(engine) as session:
        audit = Audit(id=new_id("aud"), tenant="default", request=body.stored())
        audit.provenance = {"num_shards": units}
        session.add(audit)
        session.flush()
        rows = [
            {"id": new_id("wrk"), "audit_id": audit.id, "stage": Stage.GRADIENTS, "position": place}
            for place in range(units)
        ]
        session.execute(insert(WorkUnit).values(sent_at=func.now()), rows)
        return audit.id, str(rows[0]["id"])


def _work(url: str, unit_id: str, seconds: float) -> list[tuple[float, ...]]:
    engine = make_engine(url)
    end = time.monotonic() + seconds
    done: list[tuple[float, ...]] = []
    while time.monotonic() < end:
        times = [time.perf_counter()]
        held = claim_in_turn(engine, unit_id, owner=new_id("w"), lease_seconds=LEASE_SECONDS)
        times.append(time.perf_counter())
        if held is None:
            break
        for report_seconds in (0.0, LEASE_SECONDS):
            work.renew(
                engine,
                held,
                lease_seconds=LEASE_SECONDS,
                done=1,
                total=2,
                report_seconds=report_seconds,
            )
            times.append(time.perf_counter())
        with transaction(engine) as session:
            work.complete(session, held, result={})
        times.append(time.perf_counter())
        done.append(tuple(after - before for before, after in itertools.pairwise(times)))
    engine.dispose()
    return done


@contextmanager
def database() -> Iterator[str]:
    """Run a PostgreSQL with the service's tables; yield its address."""
    with (
        tempfile.TemporaryDirectory(prefix="winnow-claims-") as folder,
        embedded_postgres(Path(folder) / "servers") as url,
    ):
        address = url.replace("postgresql://", "postgresql+psycopg://", 1)
        migrate(make_engine(address))
        yield address


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--claimers", type=int, nargs="*", default=[1, 4])
    options = parser.parse_args()
    table = Table(title="Milliseconds of one call, the quickest tenth")
    columns = ("units", "claimers", "claim", "report", "sign of life", "end", "units a second")
    for column in columns:
        table.add_column(column, justify="right")
    with database() as url:
        for units in options.units:
            for claimers in options.claimers:
                found = measure(url, units=units, claimers=claimers)
                calls = (found.claim, found.renew, found.beat, found.complete)
                table.add_row(
                    f"{units:,}",
                    str(claimers),
                    *(f"{1000 * seconds:.1f}" for seconds in calls),
                    f"{found.rate:.0f}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
