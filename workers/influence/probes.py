"""Planted probes: copies of training samples with wrong targets, whose noise is known.

A configuration that ranks the copies low finds wrong labels, though no real noise is known and
nothing is trained again (our own idea, measured in docs/results.md).

Shapes: T training samples, E eligible ones, P probes.
"""

from dataclasses import dataclass

from torch import Tensor

from workers.influence.noise import flip_labels, swap_completions

# Apart from the seeds that users give to plant_noise: the same draw would pick the planted samples.
_SEED_SPACE = 0x70726F62


@dataclass(frozen=True)
class Probes:
    """Which samples are copied, and with what target.

    Attributes:
        index_P: int64, ascending, the training samples that are copied.
        target_P: int64, the wrong class of each copy; for completions the training sample whose
            completion it gets.
    """

    index_P: Tensor
    target_P: Tensor

    def __len__(self) -> int:
        return len(self.index_P)


def draw_label_probes(
    label_T: Tensor, *, eligible_T: Tensor, num_classes: int, count: int, seed: int
) -> Probes:
    """Copy `count` eligible samples with another class each, drawn uniformly.

    Raises:
        ValueError: there are fewer than two classes.
    """
    eligible_E = eligible_T.nonzero().flatten()
    label_E, is_copied_E = flip_labels(
        label_T[eligible_E],
        num_classes=num_classes,
        fraction=_share(count, len(eligible_E)),
        seed=_SEED_SPACE + seed,
    )
    return Probes(eligible_E[is_copied_E], label_E[is_copied_E])


def draw_completion_probes(
    completion_T: Tensor, *, eligible_T: Tensor, count: int, seed: int
) -> Probes:
    """Copy `count` eligible samples and exchange the completions of the copies among them.

    Args:
        completion_T: int64, equal exactly where completions are equal.
        eligible_T: bool, which samples may be copied.
        count: how many; fewer where too many completions are equal.
        seed: the same seed and completions give the same probes on every device.
    """
    eligible_E = eligible_T.nonzero().flatten()
    source_E, is_copied_E = swap_completions(
        completion_T[eligible_E],
        fraction=_share(count, len(eligible_E)),
        seed=_SEED_SPACE + seed,
    )
    return Probes(eligible_E[is_copied_E], eligible_E[source_E[is_copied_E]])


def _share(count: int, num_eligible: int) -> float:
    return min(1.0, count / num_eligible) if num_eligible else 0.0
