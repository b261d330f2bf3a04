"""The cosine of gradients."""

from torch import Tensor

from workers.influence.estimators.base import DotEstimator


class GradCosine(DotEstimator):
    """v_j · g_i / (‖v_j‖ ‖g_i‖); a zero gradient gives 0."""

    name = "grad_cosine"
    description = (
        "The direction of gradients without their length: a robust default, best aggregated by "
        "rank."
    )

    def influence(
        self, *, dot_VB: Tensor, validation_norm_V: Tensor, train_norm_B: Tensor
    ) -> Tensor:
        # the reciprocals one after the other: the product of two small norms may underflow
        return dot_VB * _reciprocal(validation_norm_V)[:, None] * _reciprocal(train_norm_B)


def _reciprocal(norm: Tensor) -> Tensor:
    return norm.reciprocal().masked_fill(norm == 0, 0.0)
