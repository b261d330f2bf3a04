"""How much memory an audit needs, estimated before it starts, and batches that fit.

Shapes: N samples.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from app.settings import Settings
from workers.device import choose_device
from workers.influence.batching import token_budget_batches
from workers.influence.errors import InsufficientMemory
from workers.influence.layers import ModuleSpec
from workers.pipeline.failures import is_out_of_memory

FLOAT32 = 4
MAX_SAMPLES_PER_BATCH = 256
MIN_TOKENS_PER_BATCH = 16
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be.

    Attributes:
        tokens: padded tokens.
        samples: samples.
    """

    tokens: int
    samples: int = MAX_SAMPLES_PER_BATCH

    @classmethod
    def planned(cls, provenance: Mapping[str, Any]) -> Self:
        """Return the limits that were planned when computing began."""
        return cls(provenance["tokens_per_batch"], provenance["samples_per_batch"])

    def samples_of(self, length: int) -> int:
        """Return how many samples of a length fit into a batch."""
        return max(1, min(self.samples, self.tokens // max(1, length)))

    def halved(self) -> Self:
        """Return half of it; in the end a batch is one sample."""
        return type(self)(max(1, self.tokens // 2), max(1, self.samples // 2))


@dataclass(frozen=True)
class Workload:
    """What an audit holds, in float32 numbers where nothing else is said.

    Attributes:
        num_validation: validation samples, 0 without a validation set.
        row_floats: one sample's gradients over all modules, in the form that they are held.
        dense_floats: the part of them that passes through a curvature.
        largest_floats: that of the largest module among these.
        num_curvature: estimators whose queries are held beside the validation gradients.
        held_floats: sums over all samples that are held: totals, and the factors of EK-FAC; and
            the draws of the sketches.
        influence_floats: influence of all estimators on one training sample.
        activation_bytes: what a token needs in a forward and backward pass.
        keeps_gradients: whether the dense gradients are kept on disk for later passes.
    """

    num_validation: int
    row_floats: int
    dense_floats: int
    largest_floats: int
    num_curvature: int
    held_floats: int
    influence_floats: int
    activation_bytes: int
    keeps_gradients: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What fits.

    Attributes:
        limits: of a gradient batch.
        held_bytes: what stays in memory all the time: the validation gradients and their queries.
    """

    limits: BatchLimits
    held_bytes: int


def most_tokens(settings: Settings) -> int:
    """Return how many padded tokens a batch shall have where memory has room."""
    return settings.tokens_per_batch or TOKENS_PER_BATCH[choose_device(settings.device).type]


def row_floats(spec: ModuleSpec, *, num_tokens: int) -> int:
    """Return how many numbers hold one sample's gradient of a module."""
    match spec.form:
        case "factored":
            return num_tokens * sum(spec.shape)
        case "sparse":
            return num_tokens * spec.shape[-1]
        case _:
            return spec.num_parameters


def plan_memory(workload: Workload, *, free_bytes: int, tokens_per_batch: int) -> MemoryPlan:
    """Choose batches that fit into the free memory.

    Raises:
        InsufficientMemory: the validation gradients alone do not fit; says what to change.
    """
    held = FLOAT32 * (
        workload.num_validation
        * (workload.row_floats + workload.num_curvature * workload.dense_floats)
        + workload.held_floats
    )
    if held > free_bytes // 2:
        raise InsufficientMemory(
            f"The gradients of {workload.num_validation:,} validation samples, "
            f"{workload.row_floats:,} numbers each, need {held / 1e9:.1f} GB, and "
            f"{free_bytes / 1e9:.1f} GB are free. Use fewer validation samples or target modules, "
            "LoRA adapters of a lower rank, or model.projection."
        )
    per_token = workload.activation_bytes
    tokens = tokens_per_batch
    room = (free_bytes - held) // 2
    while tokens > MIN_TOKENS_PER_BATCH and tokens * per_token > room // 2:
        tokens //= 2
    samples = room // 2 // (FLOAT32 * max(1, workload.row_floats))
    limits = BatchLimits(tokens, max(1, min(MAX_SAMPLES_PER_BATCH, samples)))
    return MemoryPlan(limits, held)


def plan_shards(
    length_T: Tensor,
    limits: BatchLimits,
    *,
    samples_per_shard: int,
    tokens_per_shard: int | None = None,
) -> list[Tensor]:
    """Cut the training set into shards: runs of whole batches of the length-sorted set.

    The batches are cut over the whole set first, so a sample's batch, and with it every bit of its
    gradient, does not depend on the number of shards.

    Args:
        length_T: the samples' numbers of tokens.
        limits: of a batch.
        samples_per_shard: most samples; a larger batch is a shard of its own.
        tokens_per_shard: about how many tokens, to half a batch at either end; all shards have as
            many, so that they take as long and none is left over.

    Returns:
        For every shard the training indices of its samples, in batch order.
    """
    batches = plan_batches(length_T, limits)
    tokens_of = [int(length_T[batch].sum()) for batch in batches]
    total = sum(tokens_of)
    count = math.ceil(total / tokens_per_shard) if tokens_per_shard else 1
    shards: list[list[Tensor]] = []
    size = before = share = 0
    for batch, tokens in zip(batches, tokens_of, strict=True):
        previous, share = share, (2 * before + tokens) * count // (2 * total)
        if not shards or share != previous or size + len(batch) > samples_per_shard:
            shards.append([])
            size = 0
        shards[-1].append(batch)
        size += len(batch)
        before += tokens
    return [torch.cat(batches) for batches in shards]


def split_batches(batches: Sequence[Tensor], *, count: int) -> list[Tensor]:
    """Cut batches into `count` shards of about as many batches each; some may be empty."""
    none = torch.empty(0, dtype=torch.int64)
    ends = [len(batches) * number // count for number in range(count + 1)]
    return [torch.cat([none, *batches[start:stop]]) for start, stop in itertools.pairwise(ends)]


def plan_batches(length_T: Tensor, limits: BatchLimits) -> list[Tensor]:
    """Cut samples into batches of similar length within the limits."""
    return token_budget_batches(length_T, max_tokens=limits.tokens, max_samples=limits.samples)


def in_batches(
    index_N: Tensor,
    length_N: Tensor,
    *,
    limits: BatchLimits,
    work: Callable[[slice, Tensor], None],
) -> BatchLimits:
    """Do work batch by batch, with half the limits after every time that memory runs out.

    Args:
        index_N: indices of the samples, the longest first, as `plan_shards` gives them.
        length_N: their numbers of tokens.
        limits: those to begin with.
        work: gets the positions in `index_N` and the indices there.

    Returns:
        The limits that worked.
    """
    start = 0
    while start < len(index_N):
        stop = start + _first_batch(length_N[start:], limits)
        try:
            work(slice(start, stop), index_N[start:stop])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or stop - start == 1:
                raise
            # below MIN_TOKENS_PER_BATCH too: in the end a batch is one sample
            limits = limits.halved()
        else:
            start = stop
            continue
        # only here, after the error, is nothing of the failed batch held any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return limits


def _first_batch(length_N: Tensor, limits: BatchLimits) -> int:
    """Return the size of the first batch that `plan_batches` would cut."""
    return len(plan_batches(length_N[: limits.samples], limits)[0])
