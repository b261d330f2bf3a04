import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.influence.batching import collate, token_budget_batches


@settings(deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    max_tokens=st.integers(1, 200),
    max_samples=st.integers(1, 12),
)
def test_batches_hold_every_sample_once_within_the_limits(
    lengths: list[int], max_tokens: int, max_samples: int
) -> None:
    batches = [
        batch.tolist()
        for batch in token_budget_batches(
            torch.tensor(lengths, dtype=torch.int64), max_tokens=max_tokens, max_samples=max_samples
        )
    ]
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert len(batch) <= max_samples


def test_batches_are_filled() -> None:
    batches = token_budget_batches(torch.tensor([2, 4, 2, 4, 2]), max_tokens=8, max_samples=3)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 2, 4]]


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        token_budget_batches(torch.tensor([1]), max_tokens=0, max_samples=1)


def test_collate_pads_on_the_right() -> None:
    columns = collate([[5, 6, 7], [8]], pad_id=1, device="cpu", token_type_ids=[[0, 1, 1], [0]])
    assert {name: column.tolist() for name, column in columns.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
    }
    assert all(column.dtype == torch.int64 for column in columns.values())
