"""Samples whose loss or gradient is not finite: named, left out, and bounded in number."""

import torch
from torch import Tensor

from workers.pipeline.context import StageContext
from workers.pipeline.failures import AuditRefused

MAX_NAMED = 10


def name_rows(is_finite_N: Tensor) -> str:
    """Return the rows of the samples that are not finite, the first of them by number."""
    rows = (~is_finite_N).nonzero().flatten().tolist()
    named = ", ".join(str(row) for row in rows[:MAX_NAMED])
    more = len(rows) - MAX_NAMED
    return f"{named} and {more} more" if more > 0 else named


def check_share(context: StageContext, is_finite_N: Tensor, *, name: str) -> None:
    """Raise when too many samples of a set are not finite.

    Raises:
        AuditRefused: says how many, which, and what to change.
    """
    share = float((~is_finite_N).double().mean())
    limit = context.request.max_nonfinite_fraction
    if share <= limit and bool(is_finite_N.any()):
        return
    raise AuditRefused(
        "non_finite_influence",
        f"The loss or gradient of {int((~is_finite_N).sum()):,} of {len(is_finite_N):,} {name} "
        f"samples is not finite (rows {name_rows(is_finite_N)}), more than "
        f"max_nonfinite_fraction {limit:g} allows. Use precision float32, or check that the "
        "model's weights hold no NaN.",
        field="precision" if context.request.precision != "float32" else "model.reference",
    )


def warn_of(is_finite_N: Tensor, *, name: str) -> list[str]:
    """Return a warning that names the samples which were left out, if any."""
    count = int((~is_finite_N).sum())
    if not count:
        return []
    return [
        f"The loss or gradient of {count:,} {name} sample{'s' if count > 1 else ''} is not finite "
        f"(row{'s' if count > 1 else ''} {name_rows(is_finite_N)}): left out"
        + (", and ranked first." if name == "training" else ".")
    ]


def no_samples() -> Tensor:
    """Return the marks of a set that is not there."""
    return torch.ones(0, dtype=torch.bool)
