import pytest
import torch

from tests.influence import estimator_oracles as oracles
from tests.influence.estimators.streams import assert_near, randn
from workers.influence.estimators.repsim import RepSim


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_equals_the_cosine_pair_by_pair(scale: float) -> None:
    validation_VH, train_BH = randn(3, 6, seed=0, scale=scale), randn(4, 6, seed=1, scale=scale)
    influence_VB = RepSim().influence(validation_VH=validation_VH, train_BH=train_BH)
    assert_near(influence_VB, oracles.pairs(validation_VH, train_BH, oracles.cosine), share=1e-5)


def test_a_text_is_most_similar_to_itself() -> None:
    hidden_NH = randn(5, 8, seed=2)
    influence_NN = RepSim().influence(validation_VH=hidden_NH, train_BH=3 * hidden_NH)
    torch.testing.assert_close(influence_NN.diagonal(), torch.ones(5))
    assert influence_NN.argmax(dim=1).tolist() == [0, 1, 2, 3, 4]


def test_a_hidden_state_of_zeros_is_similar_to_nothing() -> None:
    influence_VB = RepSim().influence(
        validation_VH=torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        train_BH=torch.tensor([[0.0, 0.0], [2.0, 0.0]]),
    )
    assert influence_VB.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_half_precision_states_give_float32() -> None:
    hidden_NH = randn(2, 4, seed=3).half()
    influence_NN = RepSim().influence(validation_VH=hidden_NH, train_BH=hidden_NH)
    assert influence_NN.dtype == torch.float32
