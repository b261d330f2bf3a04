import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.influence.noise import flip_labels


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
