"""Prepared samples, made up: classes, or prompts with completions, without any tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from sqlalchemy import create_engine
from torch import Tensor

from app.audits.schemas import AuditRequest
from app.settings import Settings
from app.work.claims import Claim
from app.work.models import Stage
from tests.factories import request_body
from workers.lease import Hold
from workers.pipeline.artifacts import Artifacts, write_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.samples import SCHEMA, SampleSet, write_samples
from workers.pipeline.training_facts import TrainingFacts

AUDIT_ID = "aud_1"


def classes(path: Path, labels: Sequence[int]) -> SampleSet:
    """Write a training or validation set whose texts have one word each."""
    return _write(path, [{"label": label, "input_ids": [2, 5, 3]} for label in labels])


def completions(path: Path, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> SampleSet:
    """Write prompts with completions, as tokens."""
    return _write(
        path,
        [
            {"input_ids": [*prompt, *completion], "completion_start": len(prompt)}
            for prompt, completion in pairs
        ],
    )


def context_of(
    folder: Path, *, stage: Stage = Stage.AGGREGATE, provenance: Any = None, **request: Any
) -> StageContext:
    """Return a stage of an audit whose files lie in a folder; nobody else works on it."""
    engine, settings = create_engine("sqlite://"), Settings(data_dir=folder)
    claim = Claim("unt_1", AUDIT_ID, stage, position=0, epoch=1, attempts=1)
    return StageContext(
        engine=engine,
        settings=settings,
        claim=claim,
        hold=Hold(engine, settings, claim),
        request=AuditRequest.model_validate(request_body(**request)),
        provenance=provenance or {},
        tenant="default",
    )


def write_facts(
    artifacts: Artifacts, given_probability_N: Tensor, *, broken: Sequence[int] = ()
) -> TrainingFacts:
    """Write what a model said of samples, in one shard."""
    num_samples = len(given_probability_N)
    is_finite_N = torch.ones(num_samples, dtype=torch.bool)
    is_finite_N[list(broken)] = False
    tensors = {
        "index": torch.arange(num_samples),
        "loss": -given_probability_N.log(),
        "predicted": torch.zeros(num_samples, dtype=torch.int32),
        "predicted_probability": torch.ones(num_samples),
        "given_probability": given_probability_N,
        "squared_norm": torch.ones(6, num_samples),
        "is_finite": is_finite_N,
    }
    write_tensors(artifacts.facts(0), tensors)
    return TrainingFacts(artifacts, 1)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> SampleSet:
    texts = [{"text": f"sample {number}"} | row for number, row in enumerate(rows)]
    batch = pa.RecordBatch.from_pylist(texts, schema=SCHEMA)
    write_samples(path, iter([batch]), tick=lambda _: None)
    return SampleSet(path)
