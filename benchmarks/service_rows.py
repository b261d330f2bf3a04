"""A million ranked samples into the database, and out of the service again.

In: what a worker does with a ranking, against a bare COPY of the same rows into tables of the same
columns and, after that, their indexes and foreign keys. Out: the worker's three files against
Arrow's own writers, and a download through the real API with its first byte and its memory.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import orjson
import psutil
import psycopg
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from sqlalchemy import Engine, func

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.audits.schemas import AuditRequest
from app.db import connect_arguments, new_id, transaction
from app.work.states import enter_state, finish
from benchmarks.pages import GROUPS, REQUEST
from workers.pipeline.evidence import Evidence, Probabilities
from workers.pipeline.publish import RankedSet, copy_rows, write_files
from workers.pipeline.related import NUM_RELATED, Related
from workers.pipeline.samples import SCHEMA, SampleSet, write_samples
from workers.pipeline.training_facts import TrainingFacts

TABLES = ("training_samples", "ranked_samples")
CHUNK = 20_000
PART = 1 << 20


class _Facts(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.loss_T)


def ranked_set(folder: Path, rows: int) -> tuple[RankedSet, Evidence]:
    """Make up a ranking of reviews with two labels."""
    draw = torch.Generator().manual_seed(0)
    text = 'the film was long, and the end of it was "odd"; review '

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, rows, CHUNK):
            some = range(first, min(first + CHUNK, rows))
            columns: dict[str, list[Any]] = {
                "text": [f"{text * (1 + index % 4)}{index}" for index in some],
                "text_pair": [None] * len(some),
                "label": [index % 2 for index in some],
                "is_noisy": [index % 7 == 0 for index in some],
                "input_ids": [[1, 2]] * len(some),
            }
            columns = {name: columns.get(name, [None] * len(some)) for name in SCHEMA.names}
            yield pa.RecordBatch.from_pydict(columns, schema=SCHEMA)

    write_samples(folder / "train.arrow", batches(), tick=lambda _: None)
    probability_T = torch.rand(rows, generator=draw)
    facts = _Facts(
        predicted_T=(probability_T > 0.5).long(),
        predicted_probability_T=probability_T,
        given_probability_T=1 - probability_T,
        loss_T=torch.rand(rows, generator=draw),
        is_finite_T=torch.ones(rows, dtype=torch.bool),
    )
    index_KT = torch.randint(0, 500, (NUM_RELATED, rows), generator=draw)
    influence_KT = torch.randn(NUM_RELATED, rows, generator=draw)
    ranked = RankedSet(
        samples=SampleSet(folder / "train.arrow"),
        facts=cast("TrainingFacts", facts),
        labels=["neg", "pos"],
        group_scores={name: torch.randn(rows, generator=draw) for name in GROUPS},
        layers="all",
        num_flagged=rows // 10,
        related=Related(index_KT, influence_KT, index_KT, influence_KT),
    )
    model_TC = torch.stack([probability_T, 1 - probability_T], dim=1)
    return ranked, Evidence(probabilities=Probabilities(None, model_TC, None))


@dataclass
class Cost:
    """Seconds of the clock, and of the processors that this process took."""

    seconds: float = 0.0
    cpu: float = 0.0

    def __str__(self) -> str:
        return f"{self.seconds:8.1f} s {self.cpu:8.1f} s CPU here"


@contextmanager
def _timed() -> Iterator[Cost]:
    cost = Cost()
    began, cpu = time.perf_counter(), time.process_time()
    yield cost
    cost.seconds, cost.cpu = time.perf_counter() - began, time.process_time() - cpu


def rows_in(engine: Engine, ranked: RankedSet, evidence: Evidence) -> tuple[str, str]:
    """Print what it takes to load a ranking; return audit and ranking."""
    audit_id, ranking_id = _finished(engine, len(ranked.facts))
    with _timed() as ours, transaction(engine) as session:
        copy_rows(
            session,
            audit_id=audit_id,
            ranking_id=ranking_id,
            ranked=ranked,
            evidence=evidence,
            validation=None,
            validation_facts={},
        )
    print(f"{len(ranked.facts):,} rows into {' and '.join(TABLES)}")
    print(f"  {'as a worker does':40} {ours}")
    with psycopg.connect(**connect_arguments(engine), autocommit=True) as connection:
        for is_first in (False, True):
            bare = sum((_bare(connection, table, index_first=is_first) for table in TABLES), 0.0)
            name = "COPY into tables with indexes" if is_first else "bare COPY, then the indexes"
            print(f"  {name:40} {bare:8.1f} s; as a worker does: {ours.seconds / bare:.2f} times")
    return audit_id, ranking_id


def _bare(connection: psycopg.Connection[Any], table: str, *, index_first: bool) -> float:
    """Return the seconds that a copy of a table takes, from text that is ready."""
    text = io.BytesIO()
    with connection.cursor().copy(f"COPY {table} TO STDOUT") as copy:
        for part in copy:
            text.write(part)
    text.seek(0)
    indexes = connection.execute(
        "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = %s::regclass", [table]
    ).fetchall()
    keys = connection.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conrelid = %s::regclass AND contype = 'f'",
        [table],
    ).fetchall()
    finishing = [
        *(
            row[0].replace(" INDEX ", " INDEX bare_").replace(f".{table} ", ".bare ")
            for row in indexes
        ),
        *(f"ALTER TABLE bare ADD {row[0]}" for row in keys),
    ]
    connection.execute(f"CREATE TABLE bare (LIKE {table} INCLUDING DEFAULTS)")
    began = time.perf_counter()
    with connection.transaction(), connection.cursor() as cursor:
        for statement in finishing if index_first else ():
            cursor.execute(statement.encode())
        with cursor.copy("COPY bare FROM STDIN") as copy:
            while part := text.read(PART):
                copy.write(part)
        for statement in () if index_first else finishing:
            cursor.execute(statement.encode())
    seconds = time.perf_counter() - began
    connection.execute("DROP TABLE bare")
    return seconds


def _finished(engine: Engine, rows: int) -> tuple[str, str]:
    """Insert a finished audit and its own ranking, without their rows."""
    request = AuditRequest.model_validate(REQUEST).stored()
    audit = Audit(id=new_id("aud"), tenant="default", request=request, state_times={}, version=0)
    ranking_id = new_id("rnk")
    ranking = Ranking(
        id=ranking_id,
        audit_id=audit.id,
        tenant="default",
        is_own=True,
        specification=request["ranking"],
        flag=request["flag"],
        state=RankingState.SUCCEEDED,
        progress=1.0,
        finished_at=func.now(),
        summary={"num_flagged": rows // 10, "warnings": [], "files": {}},
        folder=Ranking.folder_of(ranking_id),
    )
    enter_state(audit, AuditState.QUEUED)
    with transaction(engine) as session:
        session.add(audit)
        session.flush()
        session.add(ranking)
        audit.num_train = rows
        finish(audit, AuditState.SUCCEEDED)
    return audit.id, ranking_id


def rows_out(
    engine: Engine, ranked: RankedSet, data_dir: Path, *, audit_id: str, ranking_id: str
) -> None:
    """Print what the worker's files cost beside Arrow's own writers."""
    folder = audit_folder(data_dir, audit_id) / Ranking.folder_of(ranking_id)
    with _timed() as together:
        files = write_files(ranked, folder)
    with transaction(engine) as session:
        ranking = session.get_one(Ranking, ranking_id)
        ranking.summary = {**ranking.summary, "files": files}
    table = pq.read_table(folder / "suspects.parquet")
    ours: dict[str, Cost] = {}
    plain: dict[str, Cost] = {}
    print(f"{table.num_rows:,} rows into files, alone and beside Arrow's own writer")
    for name, write in PLAIN.items():
        with _timed() as ours[name]:
            write_files(ranked, folder, [name])
        with _timed() as plain[name]:
            write(table, folder / f"plain.{name}")
        (folder / f"plain.{name}").unlink()
        times = ours[name].cpu / plain[name].cpu
        print(f"  {name:10} {ours[name]}; plain: {plain[name]}; {times:.2f} times")
    times = together.cpu / sum(cost.cpu for cost in plain.values())
    print(f"  {'all three':10} {together}; {times:.2f} times the three plain ones")


def _plain_jsonl(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        for batch in table.to_batches(CHUNK):
            file.writelines(orjson.dumps(row) + b"\n" for row in batch.to_pylist())


PLAIN: dict[str, Callable[[pa.Table, Path], None]] = {
    "csv": pyarrow.csv.write_csv,
    "jsonl": _plain_jsonl,
    "parquet": lambda table, path: pq.write_table(table, path, compression="zstd"),
}


def downloads(port: int, key: str, api: psutil.Process, *, audit_id: str) -> None:
    """Print how fast the files leave the API, and what it holds of them meanwhile."""
    before = api.memory_info().rss
    peak = before
    print("GET suspects.* through the API")
    with httpx2.Client(headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
        for name in PLAIN:
            firsts, rates = [], []
            for _ in range(3):
                began = time.perf_counter()
                first, size = None, 0
                with client.stream(
                    "GET", f"http://127.0.0.1:{port}/v1/audits/{audit_id}/suspects.{name}"
                ) as answer:
                    answer.raise_for_status()
                    for part in answer.iter_raw():
                        first = first or time.perf_counter() - began
                        size += len(part)
                        peak = max(peak, api.memory_info().rss)
                firsts.append(first or 0.0)
                rates.append(size / (time.perf_counter() - began))
            first, rate = statistics.median(firsts), statistics.median(rates)
            print(
                f"  {name:10} {size / 1e6:8.0f} MB {rate / 1e6:8.0f} MB/s, first byte after "
                f"{1000 * first:.0f} ms"
            )
    print(f"  memory of the API: {before / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at most")
