"""A prepared sample set: texts, classes and token ids, memory-mapped from one Arrow file.

Only lengths and classes are held in memory, so a worker's memory does not grow with the texts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from workers.influence.batching import collate
from workers.pipeline.artifacts import atomically

SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "text_pair": pa.string(),
        "label": pa.int32(),
        "is_noisy": pa.bool_(),
        "input_ids": pa.list_(pa.int32()),
        "token_type_ids": pa.list_(pa.int8()),
    }
)


class SampleSet:
    """The samples of one prepared file, in the order of the user's file."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        lengths = pc.list_value_length(self._table["input_ids"])
        self.length_T = torch.from_numpy(np.array(lengths, dtype=np.int64))
        self.label_T = torch.from_numpy(np.array(self._table["label"], dtype=np.int64))
        noisy = self._table["is_noisy"]
        self.is_noisy_T: Tensor | None = None
        if noisy.null_count == 0 and len(noisy):
            self.is_noisy_T = torch.from_numpy(np.array(noisy, dtype=bool))
        self._has_segments = self._table["token_type_ids"].null_count == 0

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def texts(self, indices: Tensor) -> list[tuple[str, str | None]]:
        """Return text and second text of the samples at `indices`."""
        rows = self._table.select(["text", "text_pair"]).take(pa.array(indices.numpy()))
        return list(zip(rows["text"].to_pylist(), rows["text_pair"].to_pylist(), strict=True))

    def batch(
        self, indices: Tensor, *, pad_id: int, device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's inputs [B, S] and the classes [B] of the samples at `indices`."""
        names = ["input_ids", "token_type_ids"] if self._has_segments else ["input_ids"]
        rows = self._table.select(names).take(pa.array(indices.numpy()))
        inputs = collate(
            rows["input_ids"].to_pylist(),
            pad_id=pad_id,
            device=device,
            token_type_ids=rows["token_type_ids"].to_pylist() if self._has_segments else None,
        )
        return inputs, self.label_T[indices].to(device)


def write_samples(
    path: Path,
    batches: Iterator[pa.RecordBatch],
    *,
    tick: Callable[[int], None],
) -> None:
    """Stream record batches of SCHEMA into a sample file, whole or not at all."""
    with atomically(path) as temporary:
        num_rows = 0
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
                num_rows += batch.num_rows
                tick(num_rows)
