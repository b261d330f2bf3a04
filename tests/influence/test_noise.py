import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.influence.noise import flip_labels, swap_completions


@settings(deadline=None, derandomize=True)
@given(
    num_samples=st.integers(0, 200),
    num_classes=st.integers(2, 6),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_exactly_the_share_gets_another_valid_label(
    num_samples: int, num_classes: int, fraction: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    label_T = torch.randint(0, num_classes, (num_samples,), generator=generator)
    original_T = label_T.clone()
    flipped_T, is_flipped_T = flip_labels(
        label_T, num_classes=num_classes, fraction=fraction, seed=seed
    )
    assert torch.equal(flipped_T != label_T, is_flipped_T)
    assert int(is_flipped_T.sum()) == round(fraction * num_samples)
    assert torch.equal(label_T, original_T)
    assert not num_samples or 0 <= int(flipped_T.min()) <= int(flipped_T.max()) < num_classes


def test_flips_are_spread_evenly_over_the_other_classes() -> None:
    flipped_T, _ = flip_labels(torch.full((30_000,), 1), num_classes=4, fraction=1.0, seed=0)
    shares = torch.bincount(flipped_T, minlength=4) / 30_000
    assert shares.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.01)


def test_a_seed_gives_the_same_flips() -> None:
    label_T = torch.zeros(100, dtype=torch.int64)
    first, second, other = (
        flip_labels(label_T, num_classes=2, fraction=0.2, seed=seed)[1] for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_single_class_cannot_be_flipped() -> None:
    with pytest.raises(ValueError, match="no other label"):
        flip_labels(torch.zeros(3, dtype=torch.int64), num_classes=1, fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        flip_labels(torch.zeros(3, dtype=torch.int64), num_classes=2, fraction=-0.5, seed=0)


@settings(deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.integers(0, 6), max_size=60),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_completions_change_hands_and_none_is_lost(
    kinds: list[int], fraction: float, seed: int
) -> None:
    completion_T = torch.tensor(kinds, dtype=torch.int64)
    source_T, is_swapped_T = swap_completions(completion_T, fraction=fraction, seed=seed)
    assert sorted(source_T.tolist()) == list(range(len(kinds)))
    assert torch.equal(is_swapped_T, completion_T[source_T] != completion_T)
    wanted = round(fraction * len(kinds))
    moved = (source_T != torch.arange(len(kinds))).nonzero().flatten()
    assert len(moved) <= max(wanted, 2 if wanted else 0)


@settings(deadline=None, derandomize=True)
@given(kinds=st.lists(st.integers(0, 4), min_size=2, max_size=40), seed=st.integers(0, 100))
def test_a_completion_is_kept_only_where_that_cannot_be_avoided(
    kinds: list[int], seed: int
) -> None:
    """Of n samples, m with the same completion: at least 2m - n of those must keep it."""
    completion_T = torch.tensor(kinds)
    _, is_swapped_T = swap_completions(completion_T, fraction=1.0, seed=seed)
    most = int(torch.bincount(completion_T).max())
    assert int((~is_swapped_T).sum()) == max(0, 2 * most - len(kinds))


def test_different_completions_all_change_in_the_share_that_was_asked_for() -> None:
    completion_T = torch.arange(50)
    source_T, is_swapped_T = swap_completions(completion_T, fraction=0.3, seed=1)
    assert int(is_swapped_T.sum()) == 15
    assert torch.equal(source_T[~is_swapped_T], torch.arange(50)[~is_swapped_T])
    again_T, _ = swap_completions(completion_T, fraction=0.3, seed=1)
    other_T, _ = swap_completions(completion_T, fraction=0.3, seed=2)
    assert torch.equal(source_T, again_T)
    assert not torch.equal(source_T, other_T)
    _, two_T = swap_completions(completion_T, fraction=0.02, seed=0)
    assert int(two_T.sum()) == 2  # one alone has nobody to exchange with
    _, none_T = swap_completions(completion_T, fraction=0.0, seed=0)
    assert not none_T.any()
    with pytest.raises(ValueError, match="not between 0 and 1"):
        swap_completions(completion_T, fraction=1.5, seed=0)
