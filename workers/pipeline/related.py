"""The validation samples that each training sample harms and helps most.

Shapes: T training samples, F those that are compared, V a block of validation samples, K the
related ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.aggregation import lowest_places
from workers.pipeline.column_source import InfluenceReader
from workers.pipeline.training_facts import TrainingFacts

NUM_RELATED = 5
_SAMPLES = 8192


@dataclass(frozen=True)
class Related:
    """Validation samples that each training sample harms and helps most.

    A training sample that is not compared has influence 0 on the first ones.

    Attributes:
        harmed_KT, helped_KT: validation indices, the most affected first.
        harm_KT, help_KT: mean influence over the ranking's modules.
    """

    harmed_KT: Tensor
    harm_KT: Tensor
    helped_KT: Tensor
    help_KT: Tensor


def _take_in(
    value_KF: Tensor, index_KF: Tensor, mean_VF: Tensor, index_V: Tensor, *, sign: int
) -> None:
    """Keep the lowest of what was kept and of a further block, some samples at a time."""
    index_V1 = index_V[:, None]
    for kept_KB, kept_index_KB, mean_VB in zip(
        *(each.split(_SAMPLES, dim=1) for each in (value_KF, index_KF, mean_VF)), strict=True
    ):
        candidate = torch.cat([kept_KB, mean_VB])
        candidate_index = torch.cat([kept_index_KB, index_V1.expand_as(mean_VB)])
        order = lowest_places(sign * candidate, len(kept_KB))
        kept_KB.copy_(candidate.gather(0, order))
        kept_index_KB.copy_(candidate_index.gather(0, order))


def find_related(
    reader: InfluenceReader,
    facts: TrainingFacts,
    *,
    rows: Sequence[int],
    index_V: Tensor,
    keep_alive: Callable[[], None],
) -> Related:
    """Find what each training sample harms and helps most.

    Args:
        reader: the influence of a pairwise estimator.
        facts: of the training samples.
        rows: the rows of the ranking's layers.
        index_V: the validation index of every column.
        keep_alive: is called again and again.
    """
    index_V = index_V.int()
    # what is kept of nothing loses to whatever comes
    shape = min(NUM_RELATED, reader.num_columns), reader.num_train
    best = {
        sign: (torch.full(shape, sign * math.inf), torch.zeros(shape, dtype=torch.int32))
        for sign in (1, -1)
    }
    for columns in reader.column_blocks():
        mean_VF = torch.zeros(columns.stop - columns.start, reader.num_train, dtype=torch.float64)
        for row in rows:
            keep_alive()
            mean_VF += reader.read(row, columns)
        mean_VF = (mean_VF / len(rows)).float()
        for sign, (value_KF, index_KF) in best.items():
            _take_in(value_KF, index_KF, mean_VF, index_V[columns], sign=sign)
    (harm_KF, harmed_KF), (help_KF, helped_KF) = best.values()

    def spread(value_KF: Tensor, default_K: Tensor) -> Tensor:
        if reader.num_train == len(facts):
            return value_KF
        value_KT = default_K[:, None].repeat(1, len(facts))
        value_KT[:, facts.compared_F] = value_KF
        return value_KT

    first_K, zero_K = index_V[: len(harm_KF)], torch.zeros(len(harm_KF))
    return Related(
        harmed_KT=spread(harmed_KF, first_K),
        harm_KT=spread(harm_KF, zero_K),
        helped_KT=spread(helped_KF, first_K),
        help_KT=spread(help_KF, zero_K),
    )
