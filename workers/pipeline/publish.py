"""Write a ranking where people and pipelines read it: files, and rows by COPY.

Shapes: T training samples, G layer groups, K related samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow.csv import CSVWriter, WriteOptions
from sqlalchemy.orm import Session
from torch import Tensor

from app.audits.answers import SCORE_ORDER
from workers.influence.aggregation import order_by_score
from workers.pipeline.arrow_columns import lists, name_labels, numbers
from workers.pipeline.artifacts import atomically, sha256_of
from workers.pipeline.copying import Columns, copy_columns
from workers.pipeline.evidence import Evidence
from workers.pipeline.judging import Judgement
from workers.pipeline.related import Related
from workers.pipeline.samples import SampleSet
from workers.pipeline.training_facts import TrainingFacts

ROWS_PER_CHUNK = 5_000
# of a file: every chunk walks through the whole prepared file once
_MOST_ROWS_PER_CHUNK = 50_000
_TEXT_BYTES_PER_CHUNK = 8 << 20
FILE_SCHEMA = pa.schema(
    {
        "rank": pa.int32(),
        "index": pa.int32(),
        "text": pa.string(),
        "text_pair": pa.string(),
        "given_label": pa.string(),
        "predicted_label": pa.string(),
        "predicted_probability": pa.float32(),
        "given_probability": pa.float32(),
        "loss": pa.float32(),
        "score": pa.float32(),
        "flagged": pa.bool_(),
        "noise_probability": pa.float32(),
        "suggested_label": pa.string(),
        "suggested_probability": pa.float32(),
        "is_noisy": pa.bool_(),
        "non_finite": pa.bool_(),
    },
    metadata={"winnow.score_order": SCORE_ORDER},
)
_INTEGERS, _NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())
TRAINING_ROWS = pa.schema(
    {
        "audit_id": pa.string(),
        "sample_index": pa.int32(),
        **{
            name: FILE_SCHEMA.field(name).type
            for name in (
                *("text", "text_pair", "given_label", "predicted_label", "predicted_probability"),
                *("given_probability", "loss", "is_noisy", "non_finite"),
            )
        },
        "alike_training": _INTEGERS,
        "alike_cosine": _NUMBERS,
        "opposed_training": _INTEGERS,
        "opposed_cosine": _NUMBERS,
        "shown_classes": _INTEGERS,
        "class_probabilities": _NUMBERS,
        "out_of_sample_probabilities": _NUMBERS,
    }
)
VALIDATION_ROWS = pa.schema(
    {
        "audit_id": pa.string(),
        "sample_index": pa.int32(),
        "text": pa.string(),
        "text_pair": pa.string(),
        "given_label": pa.string(),
        "predicted_label": pa.string(),
        "predicted_probability": pa.float32(),
        "loss": pa.float32(),
    }
)
RANKED_ROWS = pa.schema(
    {
        "ranking_id": pa.string(),
        "rank": pa.int32(),
        "sample_index": pa.int32(),
        "given_label": pa.string(),
        "score": pa.float32(),
        "flagged": pa.bool_(),
        "noise_probability": pa.float32(),
        "suggested_label": pa.string(),
        "suggested_probability": pa.float32(),
        "group_scores": _NUMBERS,
        "group_ranks": _INTEGERS,
        "harmed_validation": _INTEGERS,
        "harmed_influence": _NUMBERS,
        "helped_validation": _INTEGERS,
        "helped_influence": _NUMBERS,
    }
)

WriteTable = Callable[[pa.Table], object]

_IN_CSV = {pa.float32(): pa.float64(), pa.bool_(): pa.string()}
_CSV_SCHEMA = pa.schema({field.name: _IN_CSV.get(field.type, field.type) for field in FILE_SCHEMA})
_CSV = WriteOptions(eol="\r\n", quoting_header="none")

# What an audit's summary says of its own ranking, as a later ranking's says of itself; the rest is
# about the audit.
RANKING_SUMMARY = (
    *("num_flagged", "files", "detection", "warnings", "group_order", "layer_groups"),
    *("layer_group_order", "configurations", "module_cancellation", "choice", "noise"),
)


@dataclass(frozen=True)
class RankedSet:
    """A ranking with all that is shown of its samples.

    Attributes:
        labels: the label of each class; none for a causal language model.
        group_scores: score_T by layer group; `layers` names the one that ranks.
        num_flagged: how many of the lowest are flagged.
        judgement: how likely each sample is wrong; None where that cannot be told.
    """

    samples: SampleSet
    facts: TrainingFacts
    labels: Sequence[str]
    group_scores: dict[str, Tensor]
    layers: str
    num_flagged: int
    related: Related | None
    judgement: Judgement | None = None

    @property
    def order_T(self) -> Tensor:
        """Training indices, the most suspect first."""
        return order_by_score(self.group_scores[self.layers])

    def file_columns(self, index_N: Tensor, first_rank: int) -> Columns:
        """Return the columns of FILE_SCHEMA for the samples at consecutive ranks."""
        rank_N = torch.arange(first_rank, first_rank + len(index_N))
        noisy_T = self.samples.is_noisy_T
        return {
            "rank": numbers(rank_N),
            "index": numbers(index_N),
            **self.samples.text_columns(index_N),
            "given_label": name_labels(self.samples.label_T[index_N], self.labels),
            "predicted_label": name_labels(self.facts.predicted_T[index_N], self.labels),
            "predicted_probability": numbers(self.facts.predicted_probability_T[index_N]),
            "given_probability": numbers(self.facts.given_probability_T[index_N]),
            "loss": numbers(self.facts.loss_T[index_N]),
            "score": numbers(self.group_scores[self.layers][index_N]),
            "flagged": numbers(rank_N < self.num_flagged),
            **self.judged(index_N),
            "is_noisy": pa.nulls(len(index_N)) if noisy_T is None else numbers(noisy_T[index_N]),
            "non_finite": numbers(~self.facts.is_finite_T[index_N]),
        }

    def judged(self, index_N: Tensor) -> Columns:
        """Return how likely the samples are wrong, and the classes that they should rather have."""
        judgement, nothing = self.judgement, pa.nulls(len(index_N))
        if judgement is None:
            names = ("noise_probability", "suggested_label", "suggested_probability")
            return dict.fromkeys(names, nothing)
        return {
            "noise_probability": numbers(judgement.probability_T[index_N]),
            "suggested_label": name_labels(judgement.suggested_T[index_N], self.labels),
            "suggested_probability": numbers(judgement.suggested_probability_T[index_N])
            if self.labels
            else nothing,
        }

    def chunks(self, rows: int = ROWS_PER_CHUNK) -> Iterator[tuple[int, Tensor]]:
        """Yield first rank and training indices of chunks, in the order of the ranking."""
        first = 0
        for index_N in self.order_T.split(rows):
            yield first, index_N
            first += len(index_N)


@contextmanager
def _parquet(path: Path) -> Iterator[WriteTable]:
    with pq.ParquetWriter(path, FILE_SCHEMA, compression="zstd") as file:
        yield file.write_table


@contextmanager
def _csv(path: Path) -> Iterator[WriteTable]:
    with CSVWriter(path, _CSV_SCHEMA, write_options=_CSV) as file:
        yield lambda table: file.write_table(_as_csv(table))


@contextmanager
def _jsonl(path: Path) -> Iterator[WriteTable]:
    with path.open("wb") as file:
        yield lambda table: file.writelines(
            orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
            for batch in table.to_batches(ROWS_PER_CHUNK)
            for row in batch.to_pylist()
        )


FORMATS: Mapping[str, Callable[[Path], AbstractContextManager[WriteTable]]] = {
    "parquet": _parquet,
    "csv": _csv,
    "jsonl": _jsonl,
}


def write_files(
    ranked: RankedSet, folder: Path, formats: Sequence[str] = tuple(FORMATS)
) -> dict[str, dict[str, Any]]:
    """Write `suspects.<format>`, and return the files' sizes and SHA-256."""
    paths = {name: folder / f"suspects.{name}" for name in formats}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(FORMATS[name](stack.enter_context(atomically(path))))
            for name, path in paths.items()
        ]
        for first, index_N in ranked.chunks(_rows_per_chunk(ranked.samples)):
            table = pa.table(ranked.file_columns(index_N, first), schema=FILE_SCHEMA)
            for write in writers:
                write(table)
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in paths.items()
    }


def _rows_per_chunk(samples: SampleSet) -> int:
    rows = _TEXT_BYTES_PER_CHUNK * len(samples) // max(1, samples.text_bytes)
    return max(1, min(rows, _MOST_ROWS_PER_CHUNK))


def _as_csv(table: pa.Table) -> pa.Table:
    """Return what every reader of CSV reads as the numbers that JSON and Parquet hold."""
    columns = [
        pc.if_else(column, "True", "False") if pa.types.is_boolean(column.type) else column
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names).cast(_CSV_SCHEMA)


def copy_rows(
    session: Session,
    *,
    audit_id: str,
    ranking_id: str,
    ranked: RankedSet,
    evidence: Evidence,
    validation: SampleSet | None,
    validation_facts: Mapping[str, Tensor],
) -> None:
    """Load all rows of an audit and of its own ranking inside the caller's transaction.

    Args:
        session: the transaction.
        audit_id: whose rows they are.
        ranking_id: whose places they are.
        ranked: the training samples.
        evidence: what is known of them beside.
        validation: None for an audit without a validation set; then the facts do not count.
        validation_facts: what the model said of the validation samples.
    """
    with _driver(session).cursor() as cursor:
        training = _training_rows(audit_id, ranked, evidence)
        copy_columns(cursor, "training_samples", TRAINING_ROWS, training)
        if validation is not None:
            rows = _validation_rows(audit_id, ranked.labels, validation, validation_facts)
            copy_columns(cursor, "validation_samples", VALIDATION_ROWS, rows)
    copy_ranking(session, ranking_id=ranking_id, ranked=ranked)


def copy_ranking(session: Session, *, ranking_id: str, ranked: RankedSet) -> None:
    """Load the places of one ranking inside the caller's transaction."""
    with _driver(session).cursor() as cursor:
        copy_columns(cursor, "ranked_samples", RANKED_ROWS, _ranked_rows(ranking_id, ranked))


def _driver(session: Session) -> psycopg.Connection[Any]:
    driver = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101  the one dialect of this service
    return driver


def _training_rows(audit_id: str, ranked: RankedSet, evidence: Evidence) -> Iterator[Columns]:
    for index_N in torch.arange(len(ranked.facts)).split(ROWS_PER_CHUNK):
        columns = ranked.file_columns(index_N, 0)
        yield {
            **columns,
            "audit_id": pa.repeat(audit_id, len(index_N)),
            "sample_index": columns["index"],
            **evidence.columns(index_N),
        }


def _validation_rows(
    audit_id: str, labels: Sequence[str], samples: SampleSet, facts: Mapping[str, Tensor]
) -> Iterator[Columns]:
    for index_N in torch.arange(len(samples)).split(ROWS_PER_CHUNK):
        yield {
            "audit_id": pa.repeat(audit_id, len(index_N)),
            "sample_index": numbers(index_N),
            **samples.text_columns(index_N),
            "given_label": name_labels(samples.label_T[index_N], labels),
            "predicted_label": name_labels(facts["predicted"][index_N], labels),
            "predicted_probability": numbers(facts["predicted_probability"][index_N]),
            "loss": numbers(facts["loss"][index_N]),
        }


def _ranked_rows(ranking_id: str, ranked: RankedSet) -> Iterator[Columns]:
    scores = list(ranked.group_scores.values())
    ranks = [order_by_score(score_T).argsort().int() for score_T in scores]
    related = ranked.related
    for first, index_N in ranked.chunks():
        rank_N = torch.arange(first, first + len(index_N))
        nothing = lists(torch.empty(len(index_N), 0))
        yield {
            "ranking_id": pa.repeat(ranking_id, len(index_N)),
            "rank": numbers(rank_N),
            "sample_index": numbers(index_N),
            "given_label": name_labels(ranked.samples.label_T[index_N], ranked.labels),
            "score": numbers(ranked.group_scores[ranked.layers][index_N]),
            "flagged": numbers(rank_N < ranked.num_flagged),
            **ranked.judged(index_N),
            "group_scores": _by_sample(scores, index_N),
            "group_ranks": _by_sample(ranks, index_N),
            "harmed_validation": _by_sample(related.harmed_KT, index_N) if related else nothing,
            "harmed_influence": _by_sample(related.harm_KT, index_N) if related else nothing,
            "helped_validation": _by_sample(related.helped_KT, index_N) if related else nothing,
            "helped_influence": _by_sample(related.help_KT, index_N) if related else nothing,
        }


def _by_sample(value_KT: Iterable[Tensor], index_N: Tensor) -> pa.Array:
    """Return K numbers of each of some samples."""
    return lists(torch.stack([value_T[index_N] for value_T in value_KT], dim=1))
