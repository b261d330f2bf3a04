import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.influence import estimator_oracles as oracles
from tests.influence.estimators.streams import assert_near, randn
from workers.influence.estimators import ESTIMATORS, DotEstimator, RowStatistics
from workers.influence.estimators.self_influence import SelfInfluence

ORACLES = {
    "grad_dot": lambda v, g: float(v @ g),
    "grad_cosine": oracles.cosine,
    "grad_covariance": oracles.covariance,
    "datainf_self": oracles.datainf_self,
}


def statistics(gradient_Nd: Tensor) -> RowStatistics:
    return RowStatistics(
        norm_N=gradient_Nd.norm(dim=1),
        entry_sum_N=gradient_Nd.sum(dim=1),
        num_parameters=gradient_Nd.shape[1],
    )


def influence(name: str, validation_Vd: Tensor, train_Bd: Tensor) -> Tensor:
    estimator = ESTIMATORS[name]
    assert isinstance(estimator, DotEstimator)
    return estimator.influence(
        dot_VB=validation_Vd @ train_Bd.T,
        validation=statistics(validation_Vd),
        train=statistics(train_Bd),
    )


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    num_parameters=st.integers(1, 12),
    exponent=st.integers(-6, 6),
    shift=st.sampled_from([0.0, 3.0]),
)
@pytest.mark.parametrize("name", ORACLES)
def test_equals_its_definition_pair_by_pair(
    name: str, seed: int, num_parameters: int, exponent: int, shift: float
) -> None:
    scale = 10.0**exponent
    validation_Vd = scale * (randn(3, num_parameters, seed=seed) + shift)
    train_Bd = randn(4, num_parameters, seed=seed + 1) + shift
    actual_VB = influence(name, validation_Vd, train_Bd)
    assert_near(actual_VB, oracles.pairs(validation_Vd, train_Bd, ORACLES[name]), share=1e-4)


def test_the_cosine_neither_under_nor_overflows() -> None:
    validation_Vd, train_Bd = randn(2, 5, seed=0), randn(3, 5, seed=1)
    expected_VB = oracles.pairs(validation_Vd, train_Bd, oracles.cosine)
    for scale in (1e-15, 1e15):
        actual_VB = influence("grad_cosine", scale * validation_Vd, scale * train_Bd)
        assert_near(actual_VB, expected_VB)


@pytest.mark.parametrize("name", ORACLES)
def test_zero_gradients_have_no_influence(name: str) -> None:
    """Neither as training nor as validation sample, and never NaN."""
    gradients = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    influence_VB = influence(name, gradients, gradients)
    assert torch.isfinite(influence_VB).all()
    assert influence_VB[0].tolist() == [0.0, 0.0]
    assert influence_VB[:, 0].tolist() == [0.0, 0.0]
    assert float(influence_VB[1, 1]) > 0


@pytest.mark.parametrize(
    ("name", "validation_power", "train_power"),
    [
        ("grad_dot", 1, 1),
        ("grad_cosine", 0, 0),
        ("grad_covariance", 1, 1),
        ("datainf_self", 1, -1),
    ],
)
def test_lengths_count_as_they_should(name: str, validation_power: int, train_power: int) -> None:
    validation_Vd, train_Bd = randn(3, 6, seed=2), randn(4, 6, seed=3)
    before_VB = influence(name, validation_Vd, train_Bd)
    after_VB = influence(name, 4 * validation_Vd, 8 * train_Bd)
    assert_near(after_VB, before_VB * 4.0**validation_power * 8.0**train_power)


def test_the_covariance_ignores_what_all_entries_share() -> None:
    validation_Vd, train_Bd = randn(3, 6, seed=4), randn(4, 6, seed=5)
    assert_near(
        influence("grad_covariance", validation_Vd, train_Bd + 2),
        influence("grad_covariance", validation_Vd, train_Bd),
        share=1e-5,
    )


def test_the_largest_gradient_is_the_most_suspect_by_self_influence() -> None:
    influence_1B = SelfInfluence().influence(squared_norm_B=torch.tensor([1.0, 9.0, 4.0]))
    assert influence_1B.tolist() == [[-1.0, -9.0, -4.0]]
