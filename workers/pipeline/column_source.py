"""Read the influence of one estimator: by columns, or by training samples with all their columns.

Shapes: F training samples that are compared, B a block of them, R rows (modules or blocks of the
model), V the columns of a row that count, C a block of them, K = R · V columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from workers.influence.estimators import SampleEstimator
from workers.pipeline.artifacts import Artifacts, TensorFile
from workers.pipeline.training_facts import TrainingFacts

BLOCK_BYTES = 1024**2
SAMPLE_BLOCK_BYTES = 16 * 1024**2
FLOAT32 = 4


class ColumnSource(ABC):
    """The influence of one estimator on the compared training samples, in the order of the file.

    Attributes:
        num_rows: R.
        num_columns: V, of every row.
        num_train: F.
        num_read: samples that are read of a column, F or more.
    """

    num_rows: int
    num_columns: int
    num_train: int
    num_read: int

    def column_blocks(self) -> Iterator[slice]:
        """Yield the blocks of a row's columns that keep memory bounded."""
        step = max(1, BLOCK_BYTES // (FLOAT32 * self.num_read))
        for start in range(0, self.num_columns, step):
            yield slice(start, min(start + step, self.num_columns))

    @abstractmethod
    def read(self, row: int, columns: slice) -> Tensor:
        """Return influence_CF of one row on some columns."""


class ShardedSource(ColumnSource):
    """Influence that lies shard by shard: it can be read by samples too."""

    def __init__(self, facts: TrainingFacts) -> None:
        self._facts = facts
        self.num_train, self.num_read = len(facts.compared_F), len(facts)
        # of every compared sample the place in the shards, one after the other
        order_T = torch.cat(facts.shard_index).argsort()
        self._order_F = order_T[facts.is_compared_T].numpy()
        place_T = facts.is_compared_T.cumsum(dim=0) - 1
        self._is_kept = [facts.is_compared_T[index] for index in facts.shard_index]
        self._places = [
            place_T[index[kept]]
            for index, kept in zip(facts.shard_index, self._is_kept, strict=True)
        ]

    def read(self, row: int, columns: slice) -> Tensor:
        """Return influence_CF of one row on some columns."""
        influence_CT = np.empty((columns.stop - columns.start, len(self._facts)), dtype=np.float32)
        start = 0
        for shard, index in enumerate(self._facts.shard_index):
            stop = start + len(index)
            influence_CT[:, start:stop] = self._read_rows(shard, row, columns).numpy()
            start = stop
        # five times as fast as writing every shard's columns to their places
        return torch.from_numpy(influence_CT.take(self._order_F, axis=1))

    def sample_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training samples, as positions among the compared ones, and influence_KB."""
        num_columns = self.num_rows * self.num_columns
        step = samples_per_block(num_columns)
        for shard, (place, kept) in enumerate(zip(self._places, self._is_kept, strict=True)):
            # where a sample of the shard stands among its compared ones
            position = kept.cumsum(dim=0)
            for start in range(0, len(kept), step):
                block = slice(start, min(start + step, len(kept)))
                kept_B = kept[block]
                if not bool(kept_B.any()):
                    continue
                influence_KB = self._read_samples(shard, block).reshape(num_columns, -1)
                if not bool(kept_B.all()):
                    influence_KB = influence_KB[:, kept_B]
                last = int(position[block.stop - 1])
                yield place[last - int(kept_B.sum()) : last], influence_KB

    @abstractmethod
    def _read_rows(self, shard: int, row: int, columns: slice) -> Tensor:
        """Return a shard's influence of one row on some columns, [C, T_shard]."""

    @abstractmethod
    def _read_samples(self, shard: int, samples: slice) -> Tensor:
        """Return the influence of some of a shard's samples on all columns, [R, V, B]."""


class InfluenceReader(ShardedSource):
    """Reads the influence files of a pairwise or class estimator.

    Args:
        artifacts: the audit's files.
        estimator: its name.
        facts: of the training samples.
        chosen_V: which columns of the files count, ascending; None is all.
        checkpoints: whose influence is added up, in this order; None is the audited state.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        estimator: str,
        facts: TrainingFacts,
        *,
        chosen_V: Tensor | None = None,
        checkpoints: Sequence[int | None] = (None,),
    ) -> None:
        super().__init__(facts)
        self._files = [
            [
                TensorFile(artifacts.influence(estimator, shard, checkpoint))
                for checkpoint in checkpoints
            ]
            for shard in range(len(facts.shard_index))
        ]
        self.num_rows, num_columns, _ = self._files[0][0].shape("influence")
        self._chosen_V = chosen_V
        if chosen_V is None or len(chosen_V) == num_columns:
            self._chosen_V, self.num_columns = None, num_columns
        else:
            self.num_columns = len(chosen_V)

    def _read_rows(self, shard: int, row: int, columns: slice) -> Tensor:
        chosen_C = None if self._chosen_V is None else self._chosen_V[columns]
        if chosen_C is not None:
            columns = slice(int(chosen_C[0]), int(chosen_C[-1]) + 1)
        influence = self._sum(
            [file.rows("influence", row, rows=columns) for file in self._files[shard]]
        )
        return influence if chosen_C is None else influence[chosen_C - columns.start]

    def _read_samples(self, shard: int, samples: slice) -> Tensor:
        influence = self._sum([file.columns("influence", samples) for file in self._files[shard]])
        return influence if self._chosen_V is None else influence[:, self._chosen_V]

    @staticmethod
    def _sum(parts: Sequence[Tensor]) -> Tensor:
        total, *others = parts
        for part in others:
            total += part
        return total


class LengthReader(ShardedSource):
    """The influence of a sample estimator, from the squared lengths of the gradients.

    Args:
        estimator: what turns lengths into influence.
        facts: of the training samples.
        num_rows: how many modules count: the first ones.
    """

    num_columns = 1

    def __init__(self, estimator: SampleEstimator, facts: TrainingFacts, *, num_rows: int) -> None:
        super().__init__(facts)
        self._estimator = estimator
        self.num_rows = num_rows

    def _read_rows(
        self,
        shard: int,
        row: int,
        columns: slice,  # noqa: ARG002 - there is one
    ) -> Tensor:
        squared_norm_T = self._facts.files[shard].rows("squared_norm", row)
        return self._estimator.influence(squared_norm_B=squared_norm_T)

    def _read_samples(self, shard: int, samples: slice) -> Tensor:
        squared_norm_MB = self._facts.files[shard].columns("squared_norm", samples)
        return torch.stack(
            [
                self._estimator.influence(squared_norm_B=squared_norm_B)
                for squared_norm_B in squared_norm_MB[: self.num_rows]
            ]
        )


def samples_per_block(num_columns: int) -> int:
    """Return how many training samples with all their columns keep memory bounded."""
    return max(1, SAMPLE_BLOCK_BYTES // (FLOAT32 * num_columns))
