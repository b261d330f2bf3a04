import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.influence.batching import collate, completion_labels, token_budget_batches


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


def test_completions_are_labelled_and_nothing_else() -> None:
    label_BS = completion_labels([[5, 6, 7], [8, 9]], [1, 1], device="cpu")
    assert label_BS.tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert label_BS.dtype == torch.int64


@settings(deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.integers(1, 9).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size))),
        min_size=1,
        max_size=6,
    )
)
def test_labels_stand_where_their_tokens_do(rows: list[tuple[int, int]]) -> None:
    token_ids = [[100 * row + place for place in range(size)] for row, (size, _) in enumerate(rows)]
    starts = [start for _, start in rows]
    label_BS = completion_labels(token_ids, starts, device="cpu")
    input_BS = collate(token_ids, pad_id=7, device="cpu")["input_ids"]
    assert label_BS.shape == input_BS.shape
    is_labelled_BS = label_BS != -100
    assert torch.equal(label_BS[is_labelled_BS], input_BS[is_labelled_BS])
    assert is_labelled_BS.sum(dim=1).tolist() == [size - start for size, start in rows]
