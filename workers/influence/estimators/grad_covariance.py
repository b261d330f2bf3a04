"""The covariance of the entries of two gradients."""

from torch import Tensor

from workers.influence.estimators.base import DotEstimator, RowStatistics


class GradCovariance(DotEstimator):
    """Dot product of two gradients, each centred over its own d entries, over d − 1.

    (v_j · g_i − s(v_j) s(g_i) / d) / (d − 1) with the sums s of the entries; a module of one entry
    has no covariance: 0.
    """

    name = "grad_covariance"
    description = (
        "The dot product without what all entries of a gradient share: try it where grad_dot is "
        "dominated by a common shift, and aggregate it by vote."
    )
    needs_entry_sums = True

    def influence(
        self, *, dot_VB: Tensor, validation: RowStatistics, train: RowStatistics
    ) -> Tensor:
        d = train.num_parameters
        if d == 1:
            return dot_VB.new_zeros(dot_VB.shape)
        mean_V = validation.entry_sum_N / d
        return (dot_VB - mean_V[:, None] * train.entry_sum_N) / (d - 1)
