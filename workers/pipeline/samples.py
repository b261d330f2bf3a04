"""A prepared sample set: texts, targets and token ids, memory-mapped from one Arrow file.

Only lengths and classes are held in memory, so a worker's memory does not grow with the texts.

Shapes: T samples of the set, B batch, S sequence.
"""

import copy
import hashlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from app.shared_files import fetch
from workers.influence.batching import collate, completion_labels
from workers.pipeline.artifacts import atomically

SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "text_pair": pa.string(),
        "label": pa.int32(),
        "is_noisy": pa.bool_(),
        "input_ids": pa.list_(pa.int32()),
        "token_type_ids": pa.list_(pa.int8()),
        "completion_start": pa.int32(),
    }
)
NO_CLASS = -1
_TEXTS = ["text", "text_pair"]
_DIGEST_ROWS = 10_000


class MappedRows:
    """The rows of an Arrow file, in reach but not in memory.

    Pages that were read count as the process's own until they are let go of; the system keeps them
    for the next time, if it has room.
    """

    def __init__(self, path: Path) -> None:
        fetch(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()
        self._batches = self.table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def take(self, names: list[str], indices: Tensor) -> pa.Table:
        """Return some columns of the rows at `indices`.

        Record batch by record batch: pyarrow's own take on a whole column of lists or texts first
        copies the column, for every batch anew.
        """
        row_B = indices.numpy()
        number_B = np.searchsorted(self._starts, row_B, side="right") - 1
        order_B = np.argsort(number_B, kind="stable")
        numbers, firsts = np.unique(number_B[order_B], return_index=True)
        parts = [
            self._batches[number].select(names).take(pa.array(rows - self._starts[number]))
            for number, rows in zip(numbers, np.split(row_B[order_B], firsts[1:]), strict=True)
        ]
        taken = pa.Table.from_batches(parts).take(pa.array(order_B.argsort()))
        self.let_go()
        return taken

    def let_go(self) -> None:
        """Give back the pages that were read; the rows stay in reach."""
        self._map.madvise(mmap.MADV_DONTNEED)


class SampleSet:
    """The samples of one prepared file, in the order of the user's file.

    Attributes:
        length_T: int64, tokens of each sample.
        label_T: int64, the class of each sample; NO_CLASS for a causal language model.
        is_noisy_T: bool where noise is known, else None.
        has_completions: whether the samples are of a causal language model.
        completion_start_T: int64, the position of the first token of each completion; else 0.
    """

    def __init__(self, path: Path) -> None:
        self._rows = MappedRows(path)
        table = self._rows.table
        lengths = pc.list_value_length(table["input_ids"])
        self.length_T = torch.from_numpy(np.array(lengths, dtype=np.int64))
        classes = pc.fill_null(table["label"], NO_CLASS)
        self.label_T = torch.from_numpy(np.array(classes, dtype=np.int64))
        noisy = table["is_noisy"]
        self.is_noisy_T: Tensor | None = None
        if noisy.null_count == 0 and len(noisy):
            self.is_noisy_T = torch.from_numpy(np.array(noisy, dtype=bool))
        self._has_segments = table["token_type_ids"].null_count == 0
        self.has_completions = table["completion_start"].null_count < len(table)
        starts = pc.fill_null(table["completion_start"], 0)
        self.completion_start_T = torch.from_numpy(np.array(starts, dtype=np.int64))
        self._rows.let_go()

    def __len__(self) -> int:
        return len(self.label_T)

    def relabelled(self, label_T: Tensor) -> "SampleSet":
        """Return the same samples with other classes, for the batches too."""
        other = copy.copy(self)
        other.label_T = label_T
        return other

    def texts(self, indices: Tensor) -> list[tuple[str, str | None]]:
        """Return text and second text, or prompt and completion, of the samples at `indices`."""
        texts, others = self.text_columns(indices).values()
        return list(zip(texts.to_pylist(), others.to_pylist(), strict=True))

    @property
    def text_bytes(self) -> int:
        """Bytes of all texts."""
        columns = (self._rows.table[name] for name in _TEXTS)
        return sum(pc.sum(pc.binary_length(column)).as_py() or 0 for column in columns)

    def text_columns(self, indices: Tensor) -> dict[str, pa.ChunkedArray]:
        """Return the same as columns `text` and `text_pair`."""
        rows = self._rows.take(_TEXTS, indices)
        return {name: rows[name] for name in _TEXTS}

    def tokens(self, indices: Tensor) -> list[tuple[list[int], int]]:
        """Return the tokens of the samples at `indices`, and where their completions start."""
        token_ids = self._rows.take(["input_ids"], indices)["input_ids"].to_pylist()
        return list(zip(token_ids, self.completion_start_T[indices].tolist(), strict=True))

    def completion_digests(self) -> Tensor:
        """Return int64 [T], equal where the tokens of two completions are equal."""
        digests: list[int] = []
        for indices in torch.arange(len(self)).split(_DIGEST_ROWS):
            for token_ids, start in self.tokens(indices):
                content = np.array(token_ids[start:], dtype=np.int32).tobytes()
                digest = hashlib.blake2b(content, digest_size=8).digest()
                digests.append(int.from_bytes(digest, "little", signed=True))
        return torch.tensor(digests)

    def batch(
        self, indices: Tensor, *, pad_id: int, device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's inputs [B, S] and the targets of the samples at `indices`.

        Returns:
            The inputs, and label_B, the classes; for a causal language model label_BS, the tokens
            of the completions and -100 elsewhere, aligned with the inputs.
        """
        names = ["input_ids"]
        names += ["token_type_ids"] if self._has_segments else []
        names += ["completion_start"] if self.has_completions else []
        rows = self._rows.take(names, indices)
        token_ids = rows["input_ids"].to_pylist()
        inputs = collate(
            token_ids,
            pad_id=pad_id,
            device=device,
            token_type_ids=rows["token_type_ids"].to_pylist() if self._has_segments else None,
        )
        if self.has_completions:
            starts = rows["completion_start"].to_pylist()
            return inputs, completion_labels(token_ids, starts, device=device)
        return inputs, self.label_T[indices].to(device)


def write_samples(
    path: Path,
    batches: Iterator[pa.RecordBatch],
    *,
    tick: Callable[[int], None],
    schema: pa.Schema = SCHEMA,
) -> None:
    """Stream record batches into an Arrow file, whole or not at all."""
    with atomically(path) as temporary:
        num_rows = 0
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                num_rows += batch.num_rows
                tick(num_rows)
