"""What the samples of a table are trained for: classes, or completions; with noise if asked.

Shapes: N rows of a table, T training samples.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from app.datasets.messages import read_messages
from workers.influence.noise import flip_labels, swap_completions
from workers.pipeline.context import StageContext
from workers.pipeline.failures import AuditRefused
from workers.pipeline.samples import MappedRows, write_samples
from workers.pipeline.tables import Table, read_batches
from workers.sources.errors import SourceError
from workers.sources.heads import match_labels
from workers.sources.models import ResolvedModel

Label = int | str
_COMPLETIONS = pa.schema({"completion": pa.string()})


class SwappedCompletions:
    """The completions of a table in another order, on disk until they are tokenised."""

    def __init__(self, path: Path, source_N: Tensor) -> None:
        self._path = path
        self._rows = MappedRows(path)
        self._source_N = source_N

    def of(self, rows: slice) -> list[str]:
        """Return the completions that the rows have now."""
        taken: list[str] = self._rows.take(["completion"], self._source_N[rows])[0].to_pylist()
        return taken

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Targets:
    """What is known of the rows of a table before they are tokenised.

    Attributes:
        label_N: class indices; None for causal_lm.
        is_noisy_N: bool, known noise; None where it is not known.
        completions: those that the rows get instead of their own, None for their own.
    """

    num_rows: int
    label_N: Tensor | None
    is_noisy_N: Tensor | None
    completions: SwappedCompletions | None = None


def read_classes(
    context: StageContext, model: ResolvedModel, train: Table, trusted: Mapping[str, Table]
) -> tuple[tuple[Label, ...], dict[str, Targets]]:
    """Return the label of each class, and the classes of all sets by field, with noise if asked.

    Noise is planted in the training set alone.

    Raises:
        AuditRefused: a row is wrong, or the labels do not fit the model or one another.
    """
    train_labels, is_noisy_T = _read_labels(context, train)
    trusted_labels = {name: _read_labels(context, table)[0] for name, table in trusted.items()}
    classes = _classes(context, model, train_labels, trusted_labels)
    class_of = {label: index for index, label in enumerate(classes)}
    label_T = torch.tensor([class_of[label] for label in train_labels])
    planted = context.request.plant_noise
    if planted is not None:
        label_T, is_noisy_T = flip_labels(
            label_T, num_classes=len(classes), fraction=planted.fraction, seed=planted.seed
        )
    targets = {"train": Targets(len(label_T), label_T, is_noisy_T)}
    for name, labels in trusted_labels.items():
        label_N = torch.tensor([class_of[label] for label in labels])
        targets[name] = Targets(len(label_N), label_N, None)
    return classes, targets


def read_completions(context: StageContext, table: Table, *, scratch: Path) -> Targets:
    """Check every row of a table for causal_lm; exchange its completions if noise is asked for.

    Args:
        context: the unit of work.
        table: prompts with completions, or chats; noise is planted in the training set alone.
        scratch: where completions lie that are exchanged.

    Raises:
        AuditRefused: a row is wrong, or there are none.
    """
    planted = context.request.plant_noise if table.field == "train" else None
    noisy: list[bool | None] = []
    digests: list[int] = []

    def completions() -> Iterator[pa.RecordBatch]:
        for batch in read_batches(context, table):
            noisy.extend(batch["is_noisy"].to_pylist())
            context.hold.keep_alive()
            if planted is not None:
                texts = _completions(batch, table)
                digests.extend(_digest(text) for text in texts)
                yield pa.record_batch([pa.array(texts, pa.string())], schema=_COMPLETIONS)

    if planted is None:
        for _ in completions():
            pass
        _check_rows(len(noisy), table)
        return Targets(len(noisy), None, _known_noise(noisy, table))
    write_samples(scratch, completions(), tick=lambda _: None, schema=_COMPLETIONS)
    _check_rows(len(noisy), table)
    source_T, is_noisy_T = swap_completions(
        torch.tensor(digests), fraction=planted.fraction, seed=planted.seed
    )
    return Targets(len(noisy), None, is_noisy_T, SwappedCompletions(scratch, source_T))


def _completions(batch: pa.RecordBatch, table: Table) -> list[str]:
    if table.columns.kind == "chat":
        return [read_messages(text)[-1]["content"] for text in batch["text"].to_pylist()]
    texts: list[str] = batch["text_pair"].to_pylist()
    return texts


def _digest(text: str) -> int:
    """Return 64 bits that tell completions apart."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _read_labels(context: StageContext, table: Table) -> tuple[list[Label], Tensor | None]:
    """Return every row's label, and the known noise where a column marks it."""
    labels: list[Label] = []
    noisy: list[bool | None] = []
    for batch in read_batches(context, table):
        labels += batch["label"].to_pylist()
        noisy += batch["is_noisy"].to_pylist()
        context.hold.keep_alive()
    _check_rows(len(labels), table)
    return labels, _known_noise(noisy, table)


def _check_rows(num_rows: int, table: Table) -> None:
    if not num_rows:
        raise AuditRefused("no_rows", "The dataset has no rows.", field=table.field)


def _known_noise(noisy: list[bool | None], table: Table) -> Tensor | None:
    is_known = table.columns.noise is not None
    return torch.tensor(noisy, dtype=torch.bool) if is_known else None


def _classes(
    context: StageContext,
    model: ResolvedModel,
    train_labels: Sequence[Label],
    trusted_labels: Mapping[str, Sequence[Label]],
) -> tuple[Label, ...]:
    """Return the label of each class: the dataset's own for fine-tuning, else the model's."""
    known = set(train_labels)
    asked = {name: set(labels) for name, labels in trusted_labels.items()}
    for name, labels in asked.items():
        if {type(label) for label in known} != {type(label) for label in labels}:
            raise AuditRefused(
                "labels_mismatch",
                f"The training set and the {name} set must both have integer labels or both "
                "have text labels.",
                field=f"{name}.columns.label",
            )
    if context.request.fine_tune is None:
        try:
            return match_labels(model, sorted(known.union(*asked.values()), key=str))
        except SourceError as error:
            field = "train.columns.label" if error.field == "dataset" else "model.reference"
            raise AuditRefused(error.code, error.message, field=field) from error
    for name, labels in asked.items():
        if unknown := labels - known:
            named = ", ".join(repr(label) for label in sorted(unknown, key=str)[:10])
            raise AuditRefused(
                "labels_mismatch",
                f"The {name} set has labels that the training set has not: {named}.",
                field=f"{name}.columns.label",
            )
    if len(known) == 1:
        raise AuditRefused(
            "too_few_labels",
            "All training samples have the same label; a classifier needs at least two.",
            field="train.columns.label",
        )
    return tuple(sorted(known))
