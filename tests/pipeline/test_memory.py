"""Plans of shards, batches and memory: nothing is lost, nothing done twice, everything fits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.influence.errors import InsufficientMemory
from workers.influence.layers import Form, ModuleSpec, Part
from workers.pipeline.curvature import plan_module_blocks
from workers.pipeline.memory import (
    BatchLimits,
    Workload,
    in_batches,
    plan_batches,
    plan_memory,
    plan_shards,
    row_floats,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120).map(torch.tensor)
TOKENS = st.integers(16, 400)
SHARD = st.integers(1, 130)


def by_length(length_T: Tensor) -> Tensor:
    """The indices as a shard has them, the longest first."""
    return length_T.argsort(descending=True, stable=True)


@given(length_T=LENGTHS, tokens=TOKENS, samples=SHARD)
def test_every_sample_is_in_one_shard(length_T: Tensor, tokens: int, samples: int) -> None:
    limits = BatchLimits(tokens)
    shards = plan_shards(length_T, limits, samples_per_shard=samples)
    assert sorted(torch.cat(shards).tolist()) == list(range(len(length_T)))
    largest_batch = max(map(len, plan_batches(length_T, limits)))
    assert all(len(shard) <= max(samples, largest_batch) for shard in shards)


@given(length_T=LENGTHS, tokens=TOKENS, samples=SHARD)
def test_a_samples_batch_does_not_depend_on_the_shards(
    length_T: Tensor, tokens: int, samples: int
) -> None:
    """The batches of all shards, cut one by one, are those of the whole set."""
    limits = BatchLimits(tokens)
    shards = plan_shards(length_T, limits, samples_per_shard=samples)
    found = []
    for index_T in shards:
        batches = plan_batches(length_T[index_T], limits)
        found += [index_T[batch].tolist() for batch in batches]
    whole = plan_batches(length_T, limits)
    assert found == [batch.tolist() for batch in whole]


@given(length_T=LENGTHS, tokens=TOKENS)
def test_work_without_trouble_sees_the_planned_batches(length_T: Tensor, tokens: int) -> None:
    seen: list[list[int]] = []
    index_T = by_length(length_T)
    budget = in_batches(
        index_T,
        length_T[index_T],
        limits=BatchLimits(tokens),
        work=lambda _, indices: seen.append(indices.tolist()),
    )
    assert budget == BatchLimits(tokens)
    assert seen == [batch.tolist() for batch in plan_batches(length_T, BatchLimits(tokens))]


@given(length_T=LENGTHS, tokens=TOKENS, room=st.integers(40, 400))
def test_short_memory_halves_the_batch_and_loses_nothing(
    length_T: Tensor, tokens: int, room: int
) -> None:
    """Whatever fits, every sample is done exactly once, and the budget is remembered."""
    done: list[int] = []
    index_T = by_length(length_T)

    def work(positions: slice, indices: Tensor) -> None:
        assert torch.equal(indices, index_T[positions])
        if len(indices) * int(length_T[indices].max()) > room:
            raise torch.OutOfMemoryError("no memory")
        done.extend(indices.tolist())

    budget = in_batches(index_T, length_T[index_T], limits=BatchLimits(tokens), work=work)
    assert done == index_T.tolist()
    assert budget.tokens <= tokens
    assert in_batches(index_T, length_T[index_T], limits=budget, work=work) == budget


@given(length_T=LENGTHS, tokens=TOKENS)
def test_memory_that_never_suffices_is_an_error_and_no_endless_loop(
    length_T: Tensor, tokens: int
) -> None:
    sizes: list[int] = []

    def work(_: slice, indices: Tensor) -> None:
        sizes.append(len(indices))
        raise MemoryError

    index_T = by_length(length_T)
    with pytest.raises(MemoryError):
        in_batches(index_T, length_T[index_T], limits=BatchLimits(tokens), work=work)
    assert sizes[-1] == 1
    assert len(sizes) <= 10


def test_other_errors_are_not_taken_for_a_short_memory() -> None:
    calls: list[int] = []

    def work(_: slice, indices: Tensor) -> None:
        calls.append(len(indices))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(torch.arange(8), torch.full((8,), 4), limits=BatchLimits(64), work=work)
    assert calls == [8]


AUDIT = Workload(
    num_validation=400,
    row_floats=40_000,
    dense_floats=40_000,
    largest_floats=1536,
    num_curvature=1,
    held_floats=0,
    influence_floats=3 * 26 * 400,
    activation_bytes=220_000,
    keeps_gradients=True,
)
ASKED = {"tokens_per_batch": 4096}


@given(
    free=st.integers(2**29, 2**38),
    validation=st.integers(1, 2000),
    parameters=st.integers(100, 10**6),
    pairwise=st.integers(0, 4),
    curvature=st.integers(0, 4),
)
def test_a_plan_fits_or_is_refused(
    free: int, validation: int, parameters: int, pairwise: int, curvature: int
) -> None:
    workload = replace(
        AUDIT,
        num_validation=validation,
        row_floats=parameters,
        dense_floats=parameters,
        num_curvature=curvature,
        influence_floats=26 * validation * pairwise,
    )
    held = 4 * validation * parameters * (1 + curvature)
    if held > free // 2:
        with pytest.raises(InsufficientMemory, match="fewer validation samples"):
            plan_memory(workload, free_bytes=free, **ASKED)
        return
    plan = plan_memory(workload, free_bytes=free, **ASKED)
    assert plan.held_bytes == held
    assert 16 <= plan.limits.tokens <= 4096
    assert 1 <= plan.limits.samples <= 256
    # a batch's own gradients, in a quarter of what is free beside what is held
    batch = plan.limits.samples * 4 * parameters
    assert batch <= (free - held) // 4 or plan.limits.samples == 1


def test_plenty_of_memory_leaves_the_settings_as_they_are() -> None:
    plan = plan_memory(AUDIT, free_bytes=2**36, **ASKED)
    assert plan.limits == BatchLimits(4096, 256)


def test_a_large_vocabulary_makes_smaller_batches() -> None:
    """The logits of a token outweigh everything else of a small model."""
    reader = replace(
        AUDIT,
        activation_bytes=2_000_000,
    )
    free = 4 * 2**30
    with_logits = plan_memory(reader, free_bytes=free, **ASKED)
    without = plan_memory(AUDIT, free_bytes=free, **ASKED)
    assert with_logits.limits.tokens < without.limits.tokens


def test_what_a_gradient_takes_depends_on_its_form() -> None:
    def spec(form: Form) -> ModuleSpec:
        return ModuleSpec("m", 0, Part.ATTENTION, 32 * 64, (32, 64), form)

    assert row_floats(spec("dense"), num_tokens=10) == 32 * 64
    assert row_floats(spec("factored"), num_tokens=10) == 10 * (32 + 64)
    assert row_floats(spec("sparse"), num_tokens=10) == 10 * 64


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    num_train=st.integers(1, 1000),
    max_bytes=st.integers(0, 10**7),
)
def test_every_module_is_in_one_block_and_blocks_fit_the_disk(
    sizes: list[int], num_train: int, max_bytes: int
) -> None:
    specs = [ModuleSpec(f"m{d}", 0, Part.ATTENTION, d, (d,)) for d in sizes]
    blocks = plan_module_blocks([*enumerate(specs)], num_train=num_train, max_bytes=max_bytes)
    assert [module for block in blocks for module in block] == list(range(len(sizes)))
    for block in blocks:
        assert 1 <= len(block) <= 8
        assert len(block) == 1 or 4 * num_train * sum(sizes[m] for m in block) <= max_bytes
