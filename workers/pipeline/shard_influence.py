"""The influence of one shard by every estimator that needs nothing of the other shards.

Shapes: M modules, L blocks, V validation samples, C classes, T the shard's training samples, B a
batch of them, H hidden width.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from workers.influence.estimators import (
    ClassEstimator,
    DotEstimator,
    HiddenStateEstimator,
    RowStatistics,
    WordEmbeddingEstimator,
)
from workers.influence.gradients import SampleGradients
from workers.influence.rows import GradientRows, SparseRows
from workers.pipeline.artifacts import read_tensors
from workers.pipeline.context import StageContext
from workers.pipeline.estimating import estimators_of
from workers.pipeline.runtime import Runtime
from workers.pipeline.shards import Shard
from workers.pipeline.tensor_writer import InfluenceWriter, writing_influence


class ShardInfluence:
    """Writes influence batch by batch, one file [M, V, T] an estimator.

    Args:
        context: the unit of work.
        runtime: the model.
        shard: the shard.
        files: publishes the files at its end, or else none.
    """

    def __init__(
        self, context: StageContext, runtime: Runtime, shard: Shard, *, files: ExitStack
    ) -> None:
        artifacts, estimators = context.artifacts, estimators_of(context)
        self._artifacts = artifacts
        self._dots = [item for item in estimators if isinstance(item, DotEstimator)]
        self._classes = [item for item in estimators if isinstance(item, ClassEstimator)]
        self._words = [item for item in estimators if isinstance(item, WordEmbeddingEstimator)]
        self._hidden = [item for item in estimators if isinstance(item, HiddenStateEstimator)]
        self._needs_sums = any(item.needs_entry_sums for item in self._dots)
        self._influence: dict[str, InfluenceWriter] = {}
        if runtime.validation is None:
            return
        self._validation = runtime.validation_rows(artifacts.validation_gradients())
        self._statistics = [
            row_statistics(rows, with_sums=self._needs_sums) for rows in self._validation
        ]
        self._dotted = [
            module
            for module, rows in enumerate(self._validation)
            if not isinstance(rows, SparseRows) or context.request.model.word_embeddings
        ]
        num_validation = len(runtime.validation)
        if self._hidden:
            self._hidden_LVH = read_tensors(artifacts.hidden_states)["hidden"].to(runtime.device)
        self._fitted = self._read_fitted(runtime) if self._classes else {}
        num_classes, num_dense = len(runtime.prepared.labels), len(runtime.dense_modules)
        shapes = {
            **{item.name: (len(self._dotted), num_validation) for item in self._dots},
            **{item.name: (num_dense, num_classes) for item in self._classes},
            **{item.name: (1, num_validation) for item in self._words},
            **{item.name: (len(self._hidden_LVH), num_validation) for item in self._hidden},
        }
        for name, shape in shapes.items():
            path = shard.files.influence(name, shard.number)
            writing = writing_influence(path, (*shape, len(shard)))
            self._influence[name] = files.enter_context(writing)

    def add(self, positions: slice | Tensor, sample: SampleGradients) -> None:
        """Add a batch at its positions in the shard."""
        if not self._influence:
            return
        for module, rows in enumerate(sample.gradients):
            if isinstance(rows, SparseRows):
                self._add_words(positions, self._validation[module], rows)
            if module in self._dotted and (self._dots or self._classes):
                self._add_dots(positions, module, rows)
        hidden_LBH = sample.hidden_LBH if sample.hidden_LBH is not None else ()
        for estimator in self._hidden:
            for block, train_BH in enumerate(hidden_LBH):
                influence_VB = estimator.influence(
                    validation_VH=self._hidden_LVH[block], train_BH=train_BH
                )
                self._influence[estimator.name].put(block, positions, influence_VB)

    def _add_dots(self, positions: slice | Tensor, module: int, rows: GradientRows) -> None:
        validation, known = self._validation[module], self._statistics[module]
        dot_VB = validation.dot(rows)
        train = row_statistics(rows, with_sums=self._needs_sums)
        for estimator in self._dots:
            influence_VB = estimator.influence(dot_VB=dot_VB, validation=known, train=train)
            row = self._dotted.index(module)
            self._influence[estimator.name].put(row, positions, influence_VB)
        if isinstance(rows, SparseRows):
            return
        for number, fitted in enumerate(self._classes):
            influence_CB = fitted.influence(
                dot_VB=dot_VB,
                norm_V=known.norm_N,
                train_norm_B=train.norm_N,
                fitted=self._fitted[number, module],
            )
            self._influence[fitted.name].put(module, positions, influence_CB)

    def _add_words(
        self, positions: slice | Tensor, validation: GradientRows, rows: SparseRows
    ) -> None:
        if not isinstance(validation, SparseRows):
            raise TypeError("validation and training rows are held in different forms")
        for estimator in self._words:
            influence_VB = estimator.influence(validation=validation, train=rows)
            self._influence[estimator.name].put(0, positions, influence_VB)

    def _read_fitted(self, runtime: Runtime) -> dict[tuple[int, int], dict[str, Tensor]]:
        """Return what the class estimators fitted, by number of the estimator and module."""
        return {
            (number, module): {
                name: tensor.to(runtime.device)
                for name, tensor in read_tensors(
                    self._artifacts.fitted, prefix=f"{estimator.name}/{module:05d}/"
                ).items()
            }
            for number, estimator in enumerate(self._classes)
            for module in runtime.dense_modules
        }


def row_statistics(rows: GradientRows, *, with_sums: bool) -> RowStatistics:
    """Return lengths of gradients, and the sums of their entries where an estimator asks."""
    norm_N = rows.squared_norm().sqrt()
    return RowStatistics(
        norm_N=norm_N,
        entry_sum_N=rows.entry_sum() if with_sums else torch.zeros_like(norm_N),
        num_parameters=rows.num_parameters,
    )
