"""The similarity of hidden states."""

from torch import Tensor

from workers.influence.estimators.base import HiddenStateEstimator
from workers.influence.estimators.lengths import reciprocal


class RepSim(HiddenStateEstimator):
    """Cosine of the hidden states of one block, at the position that the model reads."""

    name = "repsim"
    description = (
        "Similar texts, without gradients: for causal language models, to find the training "
        "samples of a behaviour; says nothing of wrong labels, which it does not see."
    )

    def influence(self, *, validation_VH: Tensor, train_BH: Tensor) -> Tensor:
        return _unit(validation_VH) @ _unit(train_BH).T


def _unit(hidden_NH: Tensor) -> Tensor:
    hidden_NH = hidden_NH.float()
    # first by the largest entry: the square of a huge or tiny one is out of range
    hidden_NH = hidden_NH * reciprocal(hidden_NH.abs().amax(dim=1))[:, None]
    return hidden_NH * reciprocal(hidden_NH.norm(dim=1))[:, None]
