"""Write a ranking where people and pipelines read it: files, and rows by COPY.

Shapes: T training samples, G layer groups, K related samples.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sqlalchemy.orm import Session
from torch import Tensor

from app.audits.answers import SCORE_ORDER
from workers.influence.aggregation import order_by_score
from workers.pipeline.artifacts import atomically, sha256_of
from workers.pipeline.evidence import Evidence
from workers.pipeline.judging import Judgement
from workers.pipeline.related import Related
from workers.pipeline.samples import NO_CLASS, SampleSet
from workers.pipeline.training_facts import TrainingFacts

ROWS_PER_CHUNK = 5_000
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
TRAINING_COLUMNS = (
    "audit_id, sample_index, text, text_pair, given_label, predicted_label, "
    "predicted_probability, given_probability, loss, is_noisy, non_finite, "
    "alike_training, alike_cosine, opposed_training, opposed_cosine, "
    "shown_classes, class_probabilities, out_of_sample_probabilities"
)
VALIDATION_COLUMNS = (
    "audit_id, sample_index, text, text_pair, given_label, predicted_label, "
    "predicted_probability, loss"
)
RANKED_COLUMNS = (
    "ranking_id, rank, sample_index, given_label, score, flagged, noise_probability, "
    "suggested_label, suggested_probability, group_scores, group_ranks, "
    "harmed_validation, harmed_influence, helped_validation, helped_influence"
)

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

    def file_rows(self, index_N: Tensor, first_rank: int) -> dict[str, list[Any]]:
        """Return the columns of FILE_SCHEMA for the samples at consecutive ranks."""
        count = len(index_N)
        texts = self.samples.texts(index_N)
        noisy_T = self.samples.is_noisy_T
        ranks = range(first_rank, first_rank + count)
        return {
            "rank": list(ranks),
            "index": index_N.tolist(),
            "text": [text for text, _ in texts],
            "text_pair": [pair for _, pair in texts],
            "given_label": name_labels(self.samples.label_T[index_N], self.labels),
            "predicted_label": name_labels(self.facts.predicted_T[index_N], self.labels),
            "predicted_probability": self.facts.predicted_probability_T[index_N].tolist(),
            "given_probability": self.facts.given_probability_T[index_N].tolist(),
            "loss": self.facts.loss_T[index_N].tolist(),
            "score": self.group_scores[self.layers][index_N].tolist(),
            "flagged": [rank < self.num_flagged for rank in ranks],
            **self.judged(index_N),
            "is_noisy": noisy_T[index_N].tolist() if noisy_T is not None else [None] * count,
            "non_finite": (~self.facts.is_finite_T[index_N]).tolist(),
        }

    def judged(self, index_N: Tensor) -> dict[str, list[Any]]:
        """Return how likely the samples are wrong, and the classes that they should rather have."""
        judgement, nothing = self.judgement, [None] * len(index_N)
        if judgement is None:
            names = ("noise_probability", "suggested_label", "suggested_probability")
            return dict.fromkeys(names, nothing)
        return {
            "noise_probability": judgement.probability_T[index_N].tolist(),
            "suggested_label": name_labels(judgement.suggested_T[index_N], self.labels),
            "suggested_probability": judgement.suggested_probability_T[index_N].tolist()
            if self.labels
            else nothing,
        }

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield first rank and training indices of chunks, in the order of the ranking."""
        first = 0
        for index_N in self.order_T.split(ROWS_PER_CHUNK):
            yield first, index_N
            first += len(index_N)


def name_labels(class_N: Tensor, labels: Sequence[str]) -> list[str | None]:
    """Return the labels of classes; None for NO_CLASS, of causal language models."""
    return [None if index == NO_CLASS else labels[index] for index in class_N.tolist()]


def write_files(ranked: RankedSet, folder: Path) -> dict[str, dict[str, Any]]:
    """Write suspects.parquet, .csv and .jsonl; return their sizes and SHA-256."""
    paths = {name: folder / f"suspects.{name}" for name in ("parquet", "csv", "jsonl")}
    with (
        atomically(paths["parquet"]) as parquet_path,
        atomically(paths["csv"]) as csv_path,
        atomically(paths["jsonl"]) as jsonl_path,
        pq.ParquetWriter(parquet_path, FILE_SCHEMA, compression="zstd") as parquet,
        csv_path.open("w", encoding="utf-8", newline="") as csv_file,
        jsonl_path.open("wb") as jsonl_file,
    ):
        writer = csv.writer(csv_file)
        writer.writerow(FILE_SCHEMA.names)
        for first, index_N in ranked.chunks():
            table = pa.table(ranked.file_rows(index_N, first), schema=FILE_SCHEMA)
            parquet.write_table(table)
            rows = table.to_pylist()
            writer.writerows(row.values() for row in rows)
            jsonl_file.writelines(
                orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows
            )
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in paths.items()
    }


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
        _copy(
            cursor, "training_samples", TRAINING_COLUMNS, _training_rows(audit_id, ranked, evidence)
        )
        if validation is not None:
            _copy(
                cursor,
                "validation_samples",
                VALIDATION_COLUMNS,
                _validation_rows(audit_id, ranked.labels, validation, validation_facts),
            )
    copy_ranking(session, ranking_id=ranking_id, ranked=ranked)


def copy_ranking(session: Session, *, ranking_id: str, ranked: RankedSet) -> None:
    """Load the places of one ranking inside the caller's transaction."""
    with _driver(session).cursor() as cursor:
        _copy(cursor, "ranked_samples", RANKED_COLUMNS, _ranked_rows(ranking_id, ranked))


def _driver(session: Session) -> psycopg.Connection[Any]:
    driver = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101  the one dialect of this service
    return driver


def _copy(
    cursor: psycopg.Cursor[Any], table: str, columns: str, rows: Iterable[Sequence[Any]]
) -> None:
    with cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _training_rows(audit_id: str, ranked: RankedSet, evidence: Evidence) -> Iterator[Sequence[Any]]:
    names = TRAINING_COLUMNS.replace("sample_index", "index").split(", ")[1:]
    for index_N in torch.arange(len(ranked.facts)).split(ROWS_PER_CHUNK):
        columns = ranked.file_rows(index_N, 0) | evidence.columns(index_N)
        for row in zip(*(columns[name] for name in names), strict=True):
            yield (audit_id, *row)


def _validation_rows(
    audit_id: str, labels: Sequence[str], samples: SampleSet, facts: Mapping[str, Tensor]
) -> Iterator[Sequence[Any]]:
    for index_N in torch.arange(len(samples)).split(ROWS_PER_CHUNK):
        rows = zip(
            index_N.tolist(),
            samples.texts(index_N),
            name_labels(samples.label_T[index_N], labels),
            name_labels(facts["predicted"][index_N], labels),
            facts["predicted_probability"][index_N].tolist(),
            facts["loss"][index_N].tolist(),
            strict=True,
        )
        for index, (text, pair), given, predicted, probability, loss in rows:
            yield audit_id, index, text, pair, given, predicted, probability, loss


def _ranked_rows(ranking_id: str, ranked: RankedSet) -> Iterator[Sequence[Any]]:
    score_GT = torch.stack(list(ranked.group_scores.values()))
    rank_GT = torch.stack([order_by_score(score_T).argsort() for score_T in score_GT])
    related = ranked.related
    for first, index_N in ranked.chunks():
        nothing: list[list[Any]] = [[]] * len(index_N)
        judged = ranked.judged(index_N)
        rows = zip(
            range(first, first + len(index_N)),
            index_N.tolist(),
            name_labels(ranked.samples.label_T[index_N], ranked.labels),
            ranked.group_scores[ranked.layers][index_N].tolist(),
            zip(*judged.values(), strict=True),
            score_GT[:, index_N].T.tolist(),
            rank_GT[:, index_N].T.tolist(),
            related.harmed_KT[:, index_N].T.tolist() if related else nothing,
            related.harm_KT[:, index_N].T.tolist() if related else nothing,
            related.helped_KT[:, index_N].T.tolist() if related else nothing,
            related.help_KT[:, index_N].T.tolist() if related else nothing,
            strict=True,
        )
        for rank, index, label, score, judgement, *lists in rows:
            flagged = rank < ranked.num_flagged
            yield ranking_id, rank, index, label, score, flagged, *judgement, *lists
