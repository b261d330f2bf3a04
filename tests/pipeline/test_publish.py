"""A ranking as files and rows, of samples with labels and of those without."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sqlalchemy.orm import Session

from app.audits.models import Ranking
from app.db import new_id, transaction
from tests.factories import CAUSAL_LM_REQUEST, TENANT, make_audit
from tests.pipeline.workplace import Workplace
from workers.pipeline import publish
from workers.pipeline.arrow_columns import name_labels
from workers.pipeline.evidence import Evidence
from workers.pipeline.publish import FILE_SCHEMA, RankedSet, copy_rows, write_files
from workers.pipeline.samples import NO_CLASS, SCHEMA, SampleSet, write_samples
from workers.pipeline.training_facts import TrainingFacts

NUM = 4
LABELS = ["neg", "pos"]


def samples(path: Path, *, has_labels: bool) -> SampleSet:
    rows = [
        {
            "text": f'text, "{i}"\n',
            "text_pair": f"completion {i}",
            "label": i % 2 if has_labels else None,
            "is_noisy": i == 1,
            "input_ids": [1, 2, 3],
            "completion_start": None if has_labels else 1,
        }
        for i in range(NUM)
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    write_samples(path, iter([batch]), tick=lambda _: None)
    return SampleSet(path)


def ranked_set(path: Path, *, has_labels: bool) -> RankedSet:
    """Rank the samples 3, 2, 1, 0; the gradient of sample 3 is not finite."""
    predicted_T = torch.tensor([0, 1, 1, 0]) if has_labels else torch.full((NUM,), NO_CLASS)
    facts: dict[str, Any] = {
        "predicted_T": predicted_T,
        "predicted_probability_T": torch.full((NUM,), 0.75),
        "given_probability_T": torch.full((NUM,), 0.25),
        "loss_T": torch.full((NUM,), 1.5),
        "is_finite_T": torch.tensor([True, True, True, False]),
    }
    return RankedSet(
        samples=samples(path, has_labels=has_labels),
        facts=cast("TrainingFacts", _Facts(**facts)),
        labels=LABELS if has_labels else [],
        group_scores={"all": torch.tensor([3.0, 2.0, 1.0, 0.0])},
        layers="all",
        num_flagged=1,
        related=None,
    )


class _Facts(SimpleNamespace):
    def __len__(self) -> int:
        return NUM


def read_files(folder: Path) -> dict[str, list[dict[str, Any]]]:
    lines = (folder / "suspects.jsonl").read_bytes().splitlines()
    with (folder / "suspects.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    return {
        "parquet": pq.read_table(folder / "suspects.parquet").to_pylist(),
        "jsonl": [orjson.loads(line) for line in lines],
        "csv": cells,
    }


def _in_csv(value: object) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


@pytest.mark.parametrize("has_labels", [True, False])
def test_every_file_says_the_same(tmp_path: Path, has_labels: bool) -> None:
    ranked = ranked_set(tmp_path / "train.arrow", has_labels=has_labels)
    written = write_files(ranked, tmp_path / "results")
    assert set(written) == {"parquet", "csv", "jsonl"}
    files = read_files(tmp_path / "results")
    assert files["parquet"] == files["jsonl"]
    assert [*files["csv"][0]] == FILE_SCHEMA.names
    for row, cells in zip(files["jsonl"], files["csv"], strict=True):
        assert cells == {name: "" if of is None else _in_csv(of) for name, of in row.items()}
    first, second, *_ = files["jsonl"]
    assert (first["index"], first["non_finite"], first["flagged"]) == (3, True, True)
    assert (second["index"], second["non_finite"], second["flagged"]) == (2, False, False)
    assert first["text_pair"] == "completion 3"
    labels = [(row["given_label"], row["predicted_label"]) for row in files["jsonl"]]
    if has_labels:
        assert labels == [("pos", "neg"), ("neg", "pos"), ("pos", "pos"), ("neg", "neg")]
    else:
        assert labels == [(None, None)] * NUM


def test_long_texts_make_small_chunks_and_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = ranked_set(tmp_path / "train.arrow", has_labels=True)
    write_files(ranked, tmp_path / "whole")
    monkeypatch.setattr(publish, "_TEXT_BYTES_PER_CHUNK", 3 * ranked.samples.text_bytes // NUM)
    monkeypatch.setattr(publish, "ROWS_PER_CHUNK", 2)
    write_files(ranked, tmp_path / "chunks")
    row_groups = pq.ParquetFile(tmp_path / "chunks" / "suspects.parquet").metadata.num_row_groups
    assert row_groups == 2
    assert read_files(tmp_path / "chunks") == read_files(tmp_path / "whole")


def test_rows_of_a_causal_language_model(workplace: Workplace, tmp_path: Path) -> None:
    """They have no labels; and an audit without a validation set has no validation samples."""
    audit = make_audit(workplace.engine, **CAUSAL_LM_REQUEST)
    ranking_id = new_id("rnk")
    with transaction(workplace.engine) as session:
        add_ranking(session, audit.id, ranking_id)
        copy_rows(
            session,
            audit_id=audit.id,
            ranking_id=ranking_id,
            ranked=ranked_set(tmp_path / "train.arrow", has_labels=False),
            evidence=Evidence(),
            validation=None,
            validation_facts={},
        )
    rows = workplace.training_rows(audit.id)
    assert [row.given_label for row in rows] == [row.predicted_label for row in rows] == [None] * 4
    assert [row.non_finite for row in rows] == [False, False, False, True]
    assert [row.text_pair for row in rows] == [f"completion {i}" for i in range(NUM)]
    assert [row.sample_index for row in workplace.ranked_rows(audit.id)] == [3, 2, 1, 0]
    assert {row.given_label for row in workplace.ranked_rows(audit.id)} == {None}
    assert workplace.validation_rows(audit.id) == []


@pytest.mark.parametrize("has_labels", [True, False])
def test_rows_of_validation_samples(workplace: Workplace, tmp_path: Path, has_labels: bool) -> None:
    audit = make_audit(workplace.engine)
    ranking_id = new_id("rnk")
    ranked = ranked_set(tmp_path / "train.arrow", has_labels=has_labels)
    facts = {
        "predicted": ranked.facts.predicted_T,
        "predicted_probability": torch.full((NUM,), 0.5),
        "loss": torch.full((NUM,), 0.25),
    }
    with transaction(workplace.engine) as session:
        add_ranking(session, audit.id, ranking_id)
        copy_rows(
            session,
            audit_id=audit.id,
            ranking_id=ranking_id,
            ranked=ranked,
            evidence=Evidence(),
            validation=samples(tmp_path / "validation.arrow", has_labels=has_labels),
            validation_facts=facts,
        )
    rows = workplace.validation_rows(audit.id)
    given = ["neg", "pos", "neg", "pos"] if has_labels else [None] * NUM
    assert [row.given_label for row in rows] == given
    predicted = name_labels(ranked.facts.predicted_T, ranked.labels)
    assert [row.predicted_label for row in rows] == predicted.to_pylist()


def add_ranking(session: Session, audit_id: str, ranking_id: str) -> None:
    ranking: dict[str, Any] = {"specification": {}, "flag": {}, "folder": "results"}
    session.add(Ranking(id=ranking_id, audit_id=audit_id, tenant=TENANT, **ranking))
    session.flush()
