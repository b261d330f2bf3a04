import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.influence.cancellation import Cancellation, CancellationSums

GROUPS = {"all": [0, 1, 2], "00": [0], "CL": [1, 2]}
SIZES = (4, 3, 1)


def gradients(seed: int, num_train: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_train, size, generator=generator) for size in SIZES]


def measured(rows: Sequence[Tensor], cuts: Sequence[int] = ()) -> dict[str, Cancellation]:
    sums = CancellationSums(GROUPS, num_modules=len(rows))
    for index in torch.tensor_split(torch.arange(len(rows[0])), list(cuts)):
        sums.add_samples(
            absolute_sum_M=torch.stack([row[index].abs().sum() for row in rows]),
            squared_norm_MT=torch.stack([row[index].square().sum(dim=1) for row in rows]),
        )
    for module, row in enumerate(rows):
        sums.set_total(module, row.double().sum(dim=0))
    return sums.result()


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 7), max_size=3).map(sorted))
def test_it_is_what_its_definition_says(seed: int, cuts: list[int]) -> None:
    """A group's gradient is that of its modules, one after the other; shards do not matter."""
    rows = gradients(seed)
    found = measured(rows, cuts)
    assert found == measured(rows)
    for group, modules in GROUPS.items():
        samples = torch.cat([rows[module] for module in modules], dim=1).tolist()
        total = [math.fsum(entries) for entries in zip(*samples, strict=True)]
        l1 = math.fsum(abs(entry) for sample in samples for entry in sample)
        l2 = math.fsum(math.hypot(*sample) for sample in samples)
        assert found[group].l1 == pytest.approx(l1 / math.fsum(map(abs, total)), rel=1e-4)
        assert found[group].l2 == pytest.approx(l2 / math.hypot(*total), rel=1e-4)


def test_gradients_of_one_direction_do_not_cancel() -> None:
    rows = [torch.rand(5, 1).mul(torch.arange(1.0, size + 1)) for size in SIZES]
    single = measured([rows[0], rows[0], rows[0]])
    for cancellation in single.values():
        assert cancellation == Cancellation(l1=1.0, l2=1.0)


def test_gradients_that_add_up_to_zero_have_none() -> None:
    """Whole groups alone: a module that does not cancel keeps its group's from being none."""
    rows = gradients(0, num_train=2)
    rows[0][1] = -rows[0][0]
    found = measured(rows)
    assert found["00"] == Cancellation(l1=None, l2=None)
    assert found["all"].l1 is not None
    assert found["all"].l2 is not None
