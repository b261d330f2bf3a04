"""TracIn over several checkpoints."""

import math
from collections.abc import Sequence

from workers.influence.estimators.base import CheckpointEstimator

_MIN_CHECKPOINTS = 2


class TracIn(CheckpointEstimator):
    """TracInCP (Pruthi et al. 2020): Σ_c η_c v_j^c · g_i^c over checkpoints c."""

    name = "tracin"
    description = (
        "The dot product summed over the states of the training: for samples that the final model "
        "has memorised; a pass over both sets for every checkpoint, and aggregated by vote."
    )

    def weights(self, learning_rates: Sequence[float]) -> list[float]:
        if len(learning_rates) < _MIN_CHECKPOINTS:
            raise ValueError(
                f"tracin needs at least {_MIN_CHECKPOINTS} checkpoints, not {len(learning_rates)}."
            )
        for rate in learning_rates:
            if not (rate >= 0 and math.isfinite(rate)):
                raise ValueError(f"a learning rate of {rate:g} is no weight of a checkpoint.")
        if not any(learning_rates):
            raise ValueError("tracin needs a checkpoint with a learning rate above 0.")
        return [float(rate) for rate in learning_rates]
