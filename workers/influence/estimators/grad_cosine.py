"""The cosine of gradients."""

from torch import Tensor

from workers.influence.estimators.base import DotEstimator, RowStatistics
from workers.influence.estimators.lengths import reciprocal


class GradCosine(DotEstimator):
    """v_j · g_i / (‖v_j‖ ‖g_i‖); a zero gradient gives 0."""

    name = "grad_cosine"
    description = (
        "The direction of gradients without their length: a robust default, best aggregated by "
        "rank."
    )

    def influence(
        self, *, dot_VB: Tensor, validation: RowStatistics, train: RowStatistics
    ) -> Tensor:
        # the reciprocals one after the other: the product of two small norms may underflow
        return dot_VB * reciprocal(validation.norm_N)[:, None] * reciprocal(train.norm_N)
