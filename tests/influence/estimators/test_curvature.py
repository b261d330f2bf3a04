"""What holds for every estimator that inverts a curvature."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.influence import estimator_oracles as oracles
from tests.influence.estimators.streams import assert_near, influence, randn, training
from workers.influence.errors import NonFiniteInfluence
from workers.influence.estimators import ESTIMATORS, CurvatureEstimator, make_estimator

NAMES = [name for name, each in ESTIMATORS.items() if isinstance(each, CurvatureEstimator)]


def curvature(name: str, **parameters: float) -> CurvatureEstimator:
    estimator = make_estimator(name, parameters)
    assert isinstance(estimator, CurvatureEstimator)
    return estimator


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    num_parameters=st.integers(1, 14),
    num_train=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    damping=st.sampled_from([0.1, 1e-3, 10.0]),
)
@pytest.mark.parametrize("name", ["datainf", "gauss_newton", "ekfac"])
def test_equals_its_oracle_however_the_training_set_is_cut(
    *,
    name: str,
    seed: int,
    num_parameters: int,
    num_train: int,
    cuts: list[int],
    scale: float,
    damping: float,
) -> None:
    """More parameters than samples and the reverse, tiny and huge gradients."""
    train_Td = randn(num_train, num_parameters, seed=seed, scale=scale)
    validation_Vd = randn(3, num_parameters, seed=seed + 1)
    actual_VT = influence(
        curvature(name, damping=damping), validation_Vd, training(train_Td, cuts=cuts)
    )
    if name == "ekfac":
        expected_VT = oracles.ekfac(validation_Vd, train_Td, factors=None, damping=damping)
    elif name == "datainf":
        expected_VT = oracles.datainf(validation_Vd, train_Td, damping=damping)
    else:
        expected_VT = oracles.gauss_newton(validation_Vd, train_Td, damping=damping)
    # queries are float32: what is orthogonal to all gradients is cut off only that well
    query_norm = float(
        curvature(name, damping=damping)
        .queries(validation_Vd=validation_Vd, training=training(train_Td))
        .norm(dim=1)
        .max()
    )
    limit = 1e-6 * query_norm * float(train_Td.norm(dim=1).max())
    torch.testing.assert_close(actual_VT.double(), expected_VT, rtol=1e-5, atol=limit)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_training_set_does_not_matter(name: str) -> None:
    train_Td, validation_Vd = randn(11, 6, seed=0), randn(4, 6, seed=1)
    order_T = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    before_VT = influence(curvature(name), validation_Vd, training(train_Td))
    after_VT = influence(curvature(name), validation_Vd, training(train_Td[order_T], cuts=[5]))
    assert_near(after_VT, before_VT[:, order_T], share=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_common_scale_of_all_gradients_cancels(name: str) -> None:
    """λ goes with the square of the gradients; influence is linear in the validation sample's."""
    train_Td, validation_Vd = randn(11, 6, seed=3), randn(4, 6, seed=4)
    before_VT = influence(curvature(name), validation_Vd, training(train_Td))
    for scale in (2.0**-20, 2.0**20):
        after_VT = influence(curvature(name), scale * validation_Vd, training(scale * train_Td))
        assert_near(after_VT, before_VT, share=1e-5)
    tripled_VT = influence(curvature(name), 3 * validation_Vd, training(train_Td))
    assert_near(tripled_VT, 3 * before_VT, share=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_much_damping_leaves_the_dot_product(name: str) -> None:
    """Relative to λ the curvature is then nothing. LiSSA needs steps for none of that."""
    train_Td, validation_Vd = randn(200, 3, seed=5), randn(4, 3, seed=6)
    stream = training(train_Td)
    influence_VT = influence(curvature(name, damping=100.0), validation_Vd, stream)
    damping = 100 * stream.mean_eigenvalue
    assert_near(damping * influence_VT, validation_Vd @ train_Td.T, share=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_without_gradients_has_no_influence(name: str) -> None:
    """LoRA's A before the first step: zero, never NaN."""
    stream = training(torch.zeros(5, 4), cuts=[3])
    assert torch.equal(influence(curvature(name), torch.ones(2, 4), stream), torch.zeros(2, 5))


@pytest.mark.parametrize("name", NAMES)
def test_one_zero_gradient_among_others_has_no_influence(name: str) -> None:
    train_Td = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    influence_VT = influence(curvature(name), torch.ones(1, 2), training(train_Td))
    assert float(influence_VT[0, 1]) == 0.0
    assert torch.isfinite(influence_VT).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_validation_sample_is_no_error(name: str) -> None:
    query_Vd = curvature(name).queries(
        validation_Vd=torch.zeros(0, 4), training=training(randn(5, 4, seed=7))
    )
    assert query_Vd.shape == (0, 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_helps_itself(name: str) -> None:
    """The curvature is positive definite, so nothing harms its own copy."""
    train_Td = randn(7, 5, seed=8)
    influence_TT = influence(curvature(name), train_Td, training(train_Td))
    assert (influence_TT.diagonal() > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_overflow_names_the_validation_samples(name: str) -> None:
    stream = training(torch.tensor([[1e-15]]))
    with pytest.raises(NonFiniteInfluence) as caught:
        curvature(name).queries(validation_Vd=torch.tensor([[1e-9], [1e30]]), training=stream)
    assert caught.value.positions == (1,)


def test_nearly_parallel_gradients_lose_no_digits() -> None:
    """DataInf's bracket cancels to 1e-4 of its terms, as in a bias of two classes."""
    direction_d = randn(1000, seed=9)
    train_Td = randn(6, 1, seed=10) * direction_d
    validation_Vd = randn(2, 1, seed=11) * direction_d
    torch.testing.assert_close(
        influence(curvature("datainf"), validation_Vd, training(train_Td, cuts=[2])).double(),
        oracles.datainf(validation_Vd, train_Td),
        rtol=1e-5,
        atol=0,
    )
