"""Effort fast: gradients of those training samples alone that could be among the suspects.

The loss of every sample is told by a forward pass, which costs a quarter of an epoch. Samples with
low losses are no suspects of any estimator worth its name, so influence is computed, exactly, for
those with the highest ones; they are compared with each other, and the rest stands behind them in
the order of the losses (docs/performance.md has the measurements).

Shapes: T training samples, B a batch of them, C those of a batch that are compared.
"""

import torch
from torch import Tensor

from workers.pipeline.artifacts import TensorFile
from workers.pipeline.context import StageContext
from workers.pipeline.draws import random_order
from workers.pipeline.facts import Facts
from workers.pipeline.runtime import Runtime
from workers.pipeline.shards import Shard
from workers.pipeline.training_facts import read_compared

COMPARED_SHARE = 0.3
# a share is then known to three points
_NUM_DRAWN = 256
# of losses by products in bfloat16, where batches are padded otherwise
_ROUNDING = 0.003


def least_loss(context: StageContext, runtime: Runtime) -> float | None:
    """Return the loss from which on samples are compared; None with effort exact.

    None, too, where only the rounding of the passes tells losses apart.

    Estimated on a random part of the training set, so that shards need not wait for each other.
    """
    if context.request.effort == "exact":
        return None
    num_train = len(runtime.train)
    drawn = random_order(num_train, seed=context.request.seed, purpose="screening")[:_NUM_DRAWN]
    losses = []
    for indices in drawn.split(runtime.limits.samples_of(int(runtime.train.length_T.max()))):
        context.hold.keep_alive()
        losses.append(runtime.screen(runtime.train, indices).loss_B.cpu())
    loss_N = torch.cat(losses)
    # of samples without a finite loss nothing is computed anyway
    finite_N = loss_N[loss_N.isfinite()]
    if not len(finite_N):
        return None
    least = float(finite_N.quantile(1 - COMPARED_SHARE, interpolation="lower"))
    return least if float(finite_N.max()) > (1 + _ROUNDING) * least else None


def screened(
    context: StageContext,
    runtime: Runtime,
    shard: Shard,
    *,
    batch: slice,
    indices: Tensor,
    facts: Facts,
) -> tuple[slice | Tensor, Tensor]:
    """Put the facts of a batch of a shard, and return what `narrowed` does; nothing where exact."""
    least_loss = context.provenance.get("least_loss")
    if least_loss is None:
        return batch, indices
    seen = runtime.screen(shard.samples, indices)
    facts.put(batch, seen)
    return narrowed(batch, indices, seen.loss_B.cpu() >= least_loss)


def compared(shard: Shard) -> Tensor:
    """Return which samples of a shard are compared, bool [T], once its facts are written."""
    return read_compared(TensorFile(shard.files.facts(shard.number)))


def narrowed(
    positions: slice, indices: Tensor, is_compared_B: Tensor
) -> tuple[slice | Tensor, Tensor]:
    """Return the positions and indices of those samples of a batch that are compared."""
    if bool(is_compared_B.all()):
        return positions, indices
    chosen_C = is_compared_B.nonzero().flatten()
    return positions.start + chosen_C, indices[chosen_C]
