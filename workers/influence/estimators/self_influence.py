"""How hard a sample pulls on the model."""

from torch import Tensor

from workers.influence.estimators.base import SampleEstimator


class SelfInfluence(SampleEstimator):
    """−‖g_i‖², so that the samples with the largest gradients are the suspects."""

    name = "self_influence"
    description = (
        "The length of a sample's own gradient: finds outliers and wrong labels without a "
        "validation set."
    )

    def influence(self, *, squared_norm_B: Tensor) -> Tensor:
        return -squared_norm_B[None]
