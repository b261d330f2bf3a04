"""Plant noise in labels or completions, to measure how well it is found.

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


def swap_completions(completion_T: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Exchange completions among `round(fraction · T)` samples drawn at random, at least two.

    The drawn samples are laid in a circle, those with equal completions side by side, and each
    gets the completion of the one that lies as many places on as the most frequent completion has
    samples. So a sample keeps an equal completion only where that cannot be avoided: when more
    than half of those drawn have the same.

    Args:
        completion_T: int64, equal exactly where completions are equal.
        fraction: share of the samples to draw, 0 to 1.
        seed: the same seed and completions give the same exchange on every device.

    Returns:
        source_T: int64, the sample whose completion each sample gets; its own where not drawn.
        is_swapped_T: bool, True where the completion is another one now.

    Raises:
        ValueError: the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1.")
    num_samples = len(completion_T)
    wanted = round(fraction * num_samples)
    num_drawn = min(num_samples, max(2, wanted)) if wanted else 0
    generator = torch.Generator().manual_seed(seed)
    drawn_N = torch.randperm(num_samples, generator=generator)[:num_drawn]
    source_T = torch.arange(num_samples)
    if num_drawn:
        _, kind_N, count_K = completion_T.cpu()[drawn_N].unique(
            return_inverse=True, return_counts=True
        )
        place_K = torch.randperm(len(count_K), generator=generator)
        circle_N = drawn_N[place_K[kind_N].argsort(stable=True)]
        source_T[circle_N] = circle_N.roll(-int(count_K.max()))
    is_swapped_T = completion_T.cpu()[source_T] != completion_T.cpu()
    return source_T.to(completion_T.device), is_swapped_T.to(completion_T.device)
