"""Plant label noise, to measure how well it is found.

Shapes: T training samples.
"""

import torch
from torch import Tensor


def flip_labels(
    label_T: Tensor, *, num_classes: int, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Give exactly `round(fraction · T)` samples another label, drawn uniformly.

    Args:
        label_T: int64 class indices; left as they are.
        num_classes: 2 gives the other class, more any of the others with the same chance.
        fraction: share of the samples to flip, 0 to 1.
        seed: the same seed and labels give the same flips on every device.

    Returns:
        The labels with flips, and bool [T], True where flipped.

    Raises:
        ValueError: fewer than two classes, or the fraction is not between 0 and 1.
    """
    if num_classes < 2:  # noqa: PLR2004 - there is no other label below two
        raise ValueError(f"{num_classes} class has no other label to flip to.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    generator = torch.Generator().manual_seed(seed)
    num_samples = len(label_T)
    flipped = torch.randperm(num_samples, generator=generator)[: round(fraction * num_samples)]
    shift = torch.randint(1, num_classes, (len(flipped),), generator=generator)

    is_flipped_T = torch.zeros(num_samples, dtype=torch.bool)
    is_flipped_T[flipped] = True
    shift_T = torch.zeros(num_samples, dtype=label_T.dtype)
    shift_T[flipped] = shift.to(label_T.dtype)
    return (label_T + shift_T.to(label_T.device)) % num_classes, is_flipped_T.to(label_T.device)
