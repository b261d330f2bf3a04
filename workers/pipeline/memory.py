"""How much memory an audit needs, estimated before it starts, and batches that fit.

Shapes: V validation samples, D entries of all modules together, M modules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.batching import token_budget_batches
from workers.influence.errors import InsufficientMemory
from workers.pipeline.failures import is_out_of_memory

FLOAT32, FLOAT64 = 4, 8
MAX_SAMPLES_PER_BATCH = 256
MIN_TOKENS_PER_BATCH = 16
SHARD_BYTES = 512 * 1024**2
# Captured inputs, outputs and their gradients, in hidden-sized float32 vectors per token and layer.
ACTIVATION_VECTORS = 24


@dataclass(frozen=True)
class MemoryPlan:
    """What fits.

    Attributes:
        tokens_per_batch: padded tokens of a gradient batch.
        samples_per_shard: training samples whose influence and gradients are buffered together.
        held_bytes: what stays in memory all the time: the validation gradients and their queries.
    """

    tokens_per_batch: int
    samples_per_shard: int
    held_bytes: int


def plan_memory(
    *,
    free_bytes: int,
    num_validation: int,
    num_parameters: int,
    num_modules: int,
    num_pairwise: int,
    keeps_gradients: bool,
    hidden_size: int,
    num_layers: int,
    tokens_per_batch: int,
    samples_per_shard: int,
) -> MemoryPlan:
    """Choose batch and shard sizes that fit into the free memory.

    Raises:
        InsufficientMemory: the validation gradients alone do not fit; says what to change.
    """
    held = num_validation * num_parameters * (2 * FLOAT32 + FLOAT64)
    if held > free_bytes // 2:
        raise InsufficientMemory(
            f"The gradients of {num_validation:,} validation samples over {num_parameters:,} "
            f"parameters need {held / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free. Use "
            "fewer validation samples, fewer target modules, or LoRA adapters of a lower rank."
        )
    per_sample = FLOAT32 * (
        num_modules * num_validation * num_pairwise + (num_parameters if keeps_gradients else 0)
    )
    shard = max(1, min(samples_per_shard, SHARD_BYTES // max(1, per_sample)))
    per_token = FLOAT32 * hidden_size * num_layers * ACTIVATION_VECTORS
    tokens = tokens_per_batch
    while tokens > MIN_TOKENS_PER_BATCH and tokens * per_token > (free_bytes - held) // 2:
        tokens //= 2
    return MemoryPlan(tokens, shard, held)


def plan_shards(length_T: Tensor, *, tokens_per_batch: int, samples_per_shard: int) -> list[Tensor]:
    """Cut the training set into shards: runs of whole batches of the length-sorted set.

    The batches are cut over the whole set first, so a sample's batch, and with it every bit of its
    gradient, does not depend on the number of shards.

    Returns:
        For every shard the training indices of its samples, in batch order.
    """
    shards: list[list[Tensor]] = []
    size = samples_per_shard
    for batch in plan_batches(length_T, tokens_per_batch=tokens_per_batch):
        if size + len(batch) > samples_per_shard:
            shards.append([])
            size = 0
        shards[-1].append(batch)
        size += len(batch)
    return [torch.cat(batches) for batches in shards]


def plan_batches(length_T: Tensor, *, tokens_per_batch: int) -> list[Tensor]:
    """Cut samples into batches of similar length within a token budget."""
    return token_budget_batches(
        length_T, max_tokens=tokens_per_batch, max_samples=MAX_SAMPLES_PER_BATCH
    )


def in_batches(
    index_N: Tensor,
    length_N: Tensor,
    *,
    tokens_per_batch: int,
    work: Callable[[slice, Tensor], None],
) -> int:
    """Do work batch by batch, with half the tokens after every time that memory runs out.

    Args:
        index_N: indices of the samples, the longest first, as `plan_shards` gives them.
        length_N: their numbers of tokens.
        tokens_per_batch: the budget to begin with.
        work: gets the positions in `index_N` and the indices there.

    Returns:
        The budget that worked.
    """
    start = 0
    while start < len(index_N):
        stop = start + _first_batch(length_N[start:], tokens_per_batch=tokens_per_batch)
        try:
            work(slice(start, stop), index_N[start:stop])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or stop - start == 1:
                raise
            # below MIN_TOKENS_PER_BATCH too: in the end a batch is one sample
            tokens_per_batch = max(1, tokens_per_batch // 2)
        else:
            start = stop
            continue
        # only here, after the error, is nothing of the failed batch held any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return tokens_per_batch


def _first_batch(length_N: Tensor, *, tokens_per_batch: int) -> int:
    """Return the size of the first batch that `plan_batches` would cut."""
    length_N = length_N[:MAX_SAMPLES_PER_BATCH]
    return len(plan_batches(length_N, tokens_per_batch=tokens_per_batch)[0])
