"""Planted probes: copies with wrong targets, drawn among eligible samples alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.influence.noise import flip_labels
from workers.influence.probes import draw_completion_probes, draw_label_probes


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=60),
    st.integers(0, 80),
    st.integers(0, 5),
)
def test_every_label_probe_copies_an_eligible_sample_with_another_class(
    samples: list[tuple[int, bool]], count: int, seed: int
) -> None:
    label_T = torch.tensor([label for label, _ in samples])
    eligible_T = torch.tensor([eligible for _, eligible in samples])
    probes = draw_label_probes(
        label_T, eligible_T=eligible_T, num_classes=4, count=count, seed=seed
    )
    assert len(probes) == min(count, int(eligible_T.sum()))
    assert bool(eligible_T[probes.index_P].all())
    assert bool((probes.target_P != label_T[probes.index_P]).all())
    assert probes.index_P.tolist() == sorted(set(probes.index_P.tolist()))
    again = draw_label_probes(label_T, eligible_T=eligible_T, num_classes=4, count=count, seed=seed)
    assert torch.equal(again.target_P, probes.target_P)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60),
    st.integers(0, 80),
    st.integers(0, 5),
)
def test_every_completion_probe_gets_the_other_completion_of_another_eligible_sample(
    samples: list[tuple[int, bool]], count: int, seed: int
) -> None:
    completion_T = torch.tensor([completion for completion, _ in samples])
    eligible_T = torch.tensor([eligible for _, eligible in samples])
    probes = draw_completion_probes(completion_T, eligible_T=eligible_T, count=count, seed=seed)
    assert len(probes) <= max(2, count)
    assert bool(eligible_T[probes.index_P].all())
    assert bool(eligible_T[probes.target_P].all())
    assert bool((completion_T[probes.target_P] != completion_T[probes.index_P]).all())


def test_probes_are_another_draw_than_planted_noise_of_the_same_seed() -> None:
    label_T = torch.zeros(1000, dtype=torch.int64)
    _, is_noisy_T = flip_labels(label_T, num_classes=2, fraction=0.2, seed=3)
    eligible_T = torch.ones(1000, dtype=torch.bool)
    probes = draw_label_probes(label_T, eligible_T=eligible_T, num_classes=2, count=200, seed=3)
    share = float(is_noisy_T[probes.index_P].double().mean())
    assert 0.1 < share < 0.3
