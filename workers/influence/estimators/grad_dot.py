"""The plain dot product of gradients."""

from torch import Tensor

from workers.influence.estimators.base import DotEstimator, RowStatistics


class GradDot(DotEstimator):
    """TracIn at one checkpoint (Pruthi et al. 2020): v_j · g_i."""

    name = "grad_dot"
    description = (
        "TracIn at one checkpoint: the classic, to compare with; large gradients decide, so "
        "aggregate it by vote."
    )

    def influence(
        self,
        *,
        dot_VB: Tensor,
        validation: RowStatistics,  # noqa: ARG002 - the dot product is the whole estimate
        train: RowStatistics,  # noqa: ARG002
    ) -> Tensor:
        return dot_VB
