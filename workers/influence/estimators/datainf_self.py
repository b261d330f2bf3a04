"""DataInf with the curvature of one training sample."""

from torch import Tensor

from workers.influence.estimators.base import DotEstimator, RowStatistics
from workers.influence.estimators.lengths import reciprocal

_DAMPING_SHARE = 0.1


class DataInfSelf(DotEstimator):
    """(v_j · g_i) / ‖g_i‖² · d / (0.1 + d), "datainf_one": the Hessian is g_i g_iᵀ + λ_i I alone.

    That is DataInf's closed form with k = i only and λ_i = 0.1 ‖g_i‖² / d. A zero gradient gives 0.
    """

    name = "datainf_self"
    description = (
        "The dot product over the training gradient's squared length: small gradients count most; "
        "as cheap as grad_dot, and best aggregated by rank or vote."
    )

    def influence(
        self,
        *,
        dot_VB: Tensor,
        validation: RowStatistics,  # noqa: ARG002 - the validation gradient keeps its length
        train: RowStatistics,
    ) -> Tensor:
        d = train.num_parameters
        # one reciprocal after the other: the square of a small norm may underflow
        inverse_B = reciprocal(train.norm_N)
        return dot_VB * inverse_B * inverse_B * (d / (_DAMPING_SHARE + d))
