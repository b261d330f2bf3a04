"""What is known of every training sample beside influence.

Shapes: T training samples, N those whose loss and gradient are finite, F those of them that are
compared by influence, B the others.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workers.pipeline.artifacts import Artifacts, TensorFile

_BLOCK = 1024


class WideRows:
    """A row of numbers for each training sample, on disk: it may be more than memory has room for.

    Args:
        files: the shards' facts.
        shard_index: the training indices of every shard's samples.
        name: which of the facts.
    """

    def __init__(
        self, files: Sequence[TensorFile], shard_index: Sequence[Tensor], name: str
    ) -> None:
        self._files, self._shard_index, self._name = files, shard_index, name

    def __len__(self) -> int:
        return sum(map(len, self._shard_index))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ascending training indices, int64 [N], with their rows [N, W], until all came."""
        for index_N, file in zip(self._shard_index, self._files, strict=True):
            for start in range(0, len(index_N), _BLOCK):
                part = slice(start, start + _BLOCK)
                order_N = index_N[part].argsort()
                yield index_N[part][order_N], file.rows(self._name, rows=part)[order_N]

    def take(self, index_N: Tensor) -> Tensor:
        """Return the rows of some training samples, [N, W]."""
        place_T = torch.full((len(self),), -1)
        place_T[index_N] = torch.arange(len(index_N))
        taken_NW: Tensor | None = None
        for index_B, value_BW in self.blocks():
            if taken_NW is None:
                taken_NW = value_BW.new_empty(len(index_N), value_BW.shape[1])
            place_B = place_T[index_B]
            taken_NW[place_B[place_B >= 0]] = value_BW[place_B >= 0]
        assert taken_NW is not None  # noqa: S101 - there is no audit without samples
        return taken_NW

    def all(self) -> Tensor:
        """Return all rows, [T, W]."""
        return self.take(torch.arange(len(self)))


def read_compared(file: TensorFile) -> Tensor:
    """Return which samples of a shard's facts are compared by influence, bool [T_shard].

    Audits from before there was `effort` do not say: of these, all that are finite.
    """
    return file.rows("is_compared" if "is_compared" in file else "is_finite").bool()


class TrainingFacts:
    """The shards' facts, joined in the order of the training file.

    Attributes:
        shard_index: the training indices of every shard's samples.
        loss_T, predicted_T, predicted_probability_T, given_probability_T: as the model answered.
        is_finite_T: whether loss and gradient are finite.
        is_compared_T: whether influence is aggregated over them: all finite ones, or with effort
            fast those with high losses alone.
        num_modules: M.
    """

    def __init__(self, artifacts: Artifacts, num_shards: int) -> None:
        self.files = [TensorFile(artifacts.facts(shard)) for shard in range(num_shards)]
        self.shard_index = [file.rows("index") for file in self.files]
        self._back_T = torch.cat(self.shard_index).argsort()

        def join(name: str) -> Tensor:
            return torch.cat([file.rows(name) for file in self.files])[self._back_T]

        self.loss_T = join("loss")
        self.predicted_T = join("predicted")
        self.predicted_probability_T = join("predicted_probability")
        self.given_probability_T = join("given_probability")
        self.is_finite_T = join("is_finite").bool()
        self.is_compared_T = torch.cat([read_compared(file) for file in self.files])[self._back_T]
        self.num_modules = self.files[0].shape("squared_norm")[0]

    def only(self, kept_T: Tensor) -> "TrainingFacts":
        """Return the same facts with some samples alone counting as finite, bool [T]."""
        facts = copy.copy(self)
        facts.is_finite_T = kept_T & self.is_finite_T
        facts.is_compared_T = kept_T & self.is_compared_T
        return facts

    def replaced(self, index_N: Tensor, other: "TrainingFacts") -> "TrainingFacts":
        """Return the same facts with the finite samples of `other` at the places `index_N` [N]."""
        facts = copy.copy(self)
        facts.loss_T, facts.is_compared_T = self.loss_T.clone(), self.is_compared_T.clone()
        facts.loss_T[index_N] = other.loss_T[other.finite_N]
        facts.is_compared_T[index_N] = other.is_compared_T[other.finite_N]
        return facts

    def wide(self, name: str) -> "WideRows | None":
        """Return what is kept beside numbers, None where it is not.

        Args:
            name: `features` [T, H], `class_probability` [T, C] or `sketch` [T, K].
        """
        if any(name not in file for file in self.files):
            return None
        return WideRows(self.files, self.shard_index, name)

    @property
    def finite_N(self) -> Tensor:
        """The training indices of the finite samples."""
        return self.is_finite_T.nonzero().flatten()

    @property
    def compared_F(self) -> Tensor:
        """The training indices of the samples that are compared."""
        return self.is_compared_T.nonzero().flatten()

    @property
    def num_non_finite(self) -> int:
        """How many samples' loss or gradient is not finite."""
        return len(self) - len(self.finite_N)

    def put_first(self, score_T: Tensor) -> Tensor:
        """Return the scores with those of non-finite samples just below the lowest of the others.

        They all get the next float32 below it, so that they stand first, by training index.
        """
        if not self.num_non_finite:
            return score_T
        lowest = score_T[self.is_finite_T].min()
        below = torch.nextafter(lowest, torch.tensor(-math.inf, dtype=lowest.dtype))
        return torch.where(self.is_finite_T, score_T, below)

    def spread(self, score_F: Tensor) -> Tensor:
        """Return score_T from the scores of the compared samples.

        Finite samples that are not compared stand behind them, the higher losses first, with scores
        as far apart as those of the compared ones; those that are not finite stand first.
        """
        score_T = torch.zeros(len(self), dtype=score_F.dtype)
        score_T[self.compared_F] = score_F
        is_other_T = self.is_finite_T & ~self.is_compared_T
        if bool(is_other_T.any()):
            place_B = (-self.loss_T[is_other_T]).argsort(stable=True).argsort().double()
            highest = score_F.max()
            step = (highest - score_F.min()).clamp(min=1e-6) / len(place_B)
            score_T[is_other_T] = (highest + step * (1 + place_B)).to(score_F.dtype)
        return self.put_first(score_T)

    def __len__(self) -> int:
        return len(self.loss_T)
