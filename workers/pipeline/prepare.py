"""Stage 1: resolve the references, check and tokenise the data, plant noise if asked.

Afterwards the audit needs neither the network nor the caller's files any more.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, cast

import pyarrow as pa
import torch
from sqlalchemy import select
from sqlalchemy.orm import Session
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.audits.schemas import DatasetSource
from app.datasets.columns import ColumnNames, DatasetError
from app.datasets.files import FileFormat, read_dataset
from app.datasets.models import Dataset
from app.datasets.storage import upload_path
from app.references import parse_dataset_reference, parse_model_reference
from app.version import VERSION
from workers.influence.noise import flip_labels
from workers.pipeline.artifacts import read_json, write_json
from workers.pipeline.context import StageContext, StageOutput
from workers.pipeline.failures import AuditRefused
from workers.pipeline.samples import SCHEMA, write_samples
from workers.sources.datasets import ResolvedDataset, resolve_dataset
from workers.sources.errors import SourceError
from workers.sources.loading import load_tokenizer, longest_input, match_labels
from workers.sources.models import ResolvedModel, resolve_model

ROWS_PER_TOKENIZER_CALL = 512
Label = int | str


@dataclass(frozen=True)
class Prepared:
    """What the later stages need to know of the model and the labels.

    Attributes:
        model: where the resolved model lies.
        labels: the label of each class; the class of a sample indexes it.
        pad_id: the token that batches are padded with.
    """

    model: ResolvedModel
    labels: tuple[Label, ...]
    pad_id: int

    def write(self, path: Path) -> None:
        """Keep it for the stages that follow."""
        model = {name: _plain(value) for name, value in asdict(self.model).items()}
        write_json(path, {"model": model, "labels": list(self.labels), "pad_id": self.pad_id})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it back."""
        kept: dict[str, Any] = read_json(path)
        model = kept["model"]
        adapter, names = model["adapter_path"], model["class_names"]
        resolved = ResolvedModel(
            path=Path(model["path"]),
            adapter_path=Path(adapter) if adapter else None,
            revision=model["revision"],
            adapter_revision=model["adapter_revision"],
            model_type=model["model_type"],
            class_names=tuple(names) if names is not None else None,
        )
        return cls(resolved, tuple(kept["labels"]), kept["pad_id"])


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class _Table:
    """A dataset of the request, found and pinned."""

    path: Path
    format: FileFormat
    columns: ColumnNames
    revision: str
    field: str


def prepare(context: StageContext) -> StageOutput:
    """Resolve, check, tokenise; write the prepared sample files."""
    with context.hold.silence():
        model = _resolve_model(context)
        train = _resolve_table(context, context.request.train, field="train")
        validation = _resolve_table(context, context.request.validation, field="validation")
    train_labels, train_noise = _read_labels(context, train)
    validation_labels, _ = _read_labels(context, validation)
    classes = _classes(context, model, train_labels, validation_labels)
    class_of = {label: index for index, label in enumerate(classes)}
    label_T = torch.tensor([class_of[label] for label in train_labels])
    is_noisy_T = train_noise
    if context.request.plant_noise is not None:
        planted = context.request.plant_noise
        label_T, is_noisy_T = flip_labels(
            label_T, num_classes=len(classes), fraction=planted.fraction, seed=planted.seed
        )
    label_V = torch.tensor([class_of[label] for label in validation_labels])

    tokenizer = load_tokenizer(model)
    max_tokens = min(
        context.request.max_tokens, tokenizer.model_max_length, longest_input(model) or sys.maxsize
    )
    total = len(label_T) + len(label_V)
    artifacts = context.artifacts
    write_samples(
        artifacts.train,
        _tokenised(context, train, tokenizer, label_T, is_noisy_T, max_tokens=max_tokens),
        tick=lambda done: context.hold.tick(done, total),
    )
    write_samples(
        artifacts.validation,
        _tokenised(context, validation, tokenizer, label_V, None, max_tokens=max_tokens),
        tick=lambda done: context.hold.tick(len(label_T) + done, total),
    )
    pad_id = tokenizer.pad_token_id
    Prepared(model=model, labels=classes, pad_id=pad_id).write(artifacts.prepared)
    return StageOutput(
        columns={"num_train": len(label_T), "num_validation": len(label_V)},
        provenance={
            "engine_version": VERSION,
            "versions": _versions(),
            "model_revision": model.revision,
            "adapter_revision": model.adapter_revision,
            "train_revision": train.revision,
            "validation_revision": validation.revision,
            "precision": context.request.precision,
            "seed": context.request.seed,
        },
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def _resolve_model(context: StageContext) -> ResolvedModel:
    source = context.request.model
    return resolve_model(
        parse_model_reference(source.reference),
        adapter=parse_model_reference(source.adapter) if source.adapter else None,
        roots=context.settings.file_roots,
        hub=context.hub,
        cache_dir=context.cache_dir,
    )


def _resolve_table(context: StageContext, source: DatasetSource, *, field: str) -> _Table:
    def find_upload(dataset_id: str) -> ResolvedDataset:
        with Session(context.engine) as session:
            upload = session.scalars(
                select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant == context.tenant)
            ).one_or_none()
        if upload is None:
            raise SourceError(
                f"the upload {dataset_id} is gone; upload the file again and use its new id",
                code="not_found",
                field="dataset",
            )
        path = upload_path(context.settings.data_dir, upload.id, upload.format)
        return ResolvedDataset(path, cast("FileFormat", upload.format), upload.sha256)

    try:
        resolved = resolve_dataset(
            parse_dataset_reference(source.reference),
            find_upload=find_upload,
            roots=context.settings.file_roots,
            hub=context.hub,
            cache_dir=context.cache_dir,
            limits=context.limits,
            max_bytes=context.settings.max_upload_bytes,
        )
    except SourceError as error:
        raise AuditRefused(
            error.code, error.message, field=f"{field}.reference", transient=error.transient
        ) from error
    columns = source.columns or ColumnNames()
    return _Table(resolved.path, resolved.format, columns, resolved.revision, field)


def _batches(context: StageContext, table: _Table) -> Iterator[pa.RecordBatch]:
    try:
        yield from read_dataset(
            table.path, format=table.format, columns=table.columns, limits=context.limits
        )
    except DatasetError as error:
        field = f"{table.field}.columns.{error.field}" if error.field else table.field
        raise AuditRefused(error.code, error.message, field=field) from error


def _read_labels(context: StageContext, table: _Table) -> tuple[list[Label], Tensor | None]:
    """Return every row's label, and the known noise where a column marks it."""
    labels: list[Label] = []
    noisy: list[bool | None] = []
    for batch in _batches(context, table):
        labels += batch["label"].to_pylist()
        noisy += batch["is_noisy"].to_pylist()
        context.hold.tick(0, 1)
    if not labels:
        raise AuditRefused("no_rows", "The dataset has no rows.", field=table.field)
    is_known = table.columns.noise is not None
    return labels, torch.tensor(noisy, dtype=torch.bool) if is_known else None


def _classes(
    context: StageContext,
    model: ResolvedModel,
    train_labels: Sequence[Label],
    validation_labels: Sequence[Label],
) -> tuple[Label, ...]:
    """Return the label of each class: the dataset's own for fine-tuning, else the model's."""
    known, asked = set(train_labels), set(validation_labels)
    if {type(label) for label in known} != {type(label) for label in asked}:
        raise AuditRefused(
            "labels_mismatch",
            "The training set and the validation set must both have integer labels or both "
            "have text labels.",
            field="validation.columns.label",
        )
    if context.request.fine_tune is None:
        try:
            return match_labels(model, sorted(known | asked, key=str))
        except SourceError as error:
            field = "train.columns.label" if error.field == "dataset" else "model.reference"
            raise AuditRefused(error.code, error.message, field=field) from error
    if unknown := asked - known:
        named = ", ".join(repr(label) for label in sorted(unknown, key=str)[:10])
        raise AuditRefused(
            "labels_mismatch",
            f"The validation set has labels that the training set has not: {named}.",
            field="validation.columns.label",
        )
    if len(known) == 1:
        raise AuditRefused(
            "too_few_labels",
            "All training samples have the same label; a classifier needs at least two.",
            field="train.columns.label",
        )
    return tuple(sorted(known))


def _tokenised(
    context: StageContext,
    table: _Table,
    tokenizer: PreTrainedTokenizerBase,
    label_N: Tensor,
    is_noisy_N: Tensor | None,
    *,
    max_tokens: int,
) -> Iterator[pa.RecordBatch]:
    row = 0
    for batch in _batches(context, table):
        for start in range(0, batch.num_rows, ROWS_PER_TOKENIZER_CALL):
            part = batch.slice(start, ROWS_PER_TOKENIZER_CALL)
            rows = slice(row, row + part.num_rows)
            row += part.num_rows
            texts = part["text"].to_pylist()
            pairs = part["text_pair"].to_pylist() if table.columns.text_pair else None
            tokens = tokenizer(texts, pairs, truncation=True, max_length=max_tokens)
            segments = tokens.get("token_type_ids") if pairs else None
            noisy = is_noisy_N[rows].tolist() if is_noisy_N is not None else None
            count = part.num_rows
            yield pa.record_batch(
                [
                    part["text"].cast(pa.string()),
                    part["text_pair"].cast(pa.string()),
                    pa.array(label_N[rows].tolist(), pa.int32()),
                    pa.array(noisy, pa.bool_()) if noisy else pa.nulls(count, pa.bool_()),
                    pa.array(tokens["input_ids"], SCHEMA.field("input_ids").type),
                    pa.array(segments, SCHEMA.field("token_type_ids").type)
                    if segments
                    else pa.nulls(count, SCHEMA.field("token_type_ids").type),
                ],
                schema=SCHEMA,
            )
