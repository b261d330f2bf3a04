import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import datainf_influence
from workers.influence.errors import NonFiniteInfluence
from workers.influence.estimators.datainf import DataInf


def influence(validation_Vd: Tensor, train_Td: Tensor, *, cuts: list[int]) -> Tensor:
    """DataInf as a pipeline computes it: curvature block by block, then one product."""
    estimator = DataInf()
    damping = estimator.damping(
        mean_squared_norm=float(train_Td.double().square().sum(dim=1).mean()),
        num_parameters=train_Td.shape[1],
    )
    curvature_Vd = torch.zeros(validation_Vd.shape, dtype=torch.float64)
    for block_Bd in torch.tensor_split(train_Td, cuts):
        curvature_Vd += estimator.partial_curvature(
            validation_Vd=validation_Vd, train_Bd=block_Bd, damping=damping
        )
    query_Vd = estimator.precondition(
        validation_Vd=validation_Vd,
        curvature_Vd=curvature_Vd,
        num_train=len(train_Td),
        damping=damping,
    )
    return query_Vd @ train_Td.T


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    num_parameters=st.integers(1, 30),
    num_train=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_equals_the_double_sum_however_the_training_set_is_cut(
    seed: int, num_parameters: int, num_train: int, cuts: list[int], scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    train_Td = scale * torch.randn(num_train, num_parameters, generator=generator)
    validation_Vd = torch.randn(3, num_parameters, generator=generator)
    expected_VT = datainf_influence(validation_Vd, train_Td)
    actual_VT = influence(validation_Vd, train_Td, cuts=cuts)
    # a dot product is as exact as its vectors are long
    limit = 1e-5 * float(expected_VT.abs().max())
    torch.testing.assert_close(actual_VT.double(), expected_VT, rtol=1e-5, atol=limit)


def test_nearly_parallel_gradients_lose_no_digits() -> None:
    """The bracket cancels to 1e-4 of its terms, as in a bias of two classes."""
    generator = torch.Generator().manual_seed(0)
    direction_d = torch.randn(1000, generator=generator)
    train_Td = torch.randn(6, 1, generator=generator) * direction_d
    validation_Vd = torch.randn(2, 1, generator=generator) * direction_d
    torch.testing.assert_close(
        influence(validation_Vd, train_Td, cuts=[2]).double(),
        datainf_influence(validation_Vd, train_Td),
        rtol=1e-5,
        atol=0,
    )


def test_a_module_without_gradients_has_no_influence() -> None:
    """LoRA's A before the first step: zero, never NaN."""
    influence_VT = influence(torch.ones(2, 4), torch.zeros(5, 4), cuts=[3])
    assert torch.equal(influence_VT, torch.zeros(2, 5))


def test_one_zero_gradient_among_others_has_no_influence() -> None:
    train_Td = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    influence_VT = influence(torch.ones(1, 2), train_Td, cuts=[])
    assert float(influence_VT[0, 1]) == 0.0
    assert torch.isfinite(influence_VT).all()


def test_overflow_names_the_validation_samples() -> None:
    with pytest.raises(NonFiniteInfluence) as caught:
        DataInf().precondition(
            validation_Vd=torch.tensor([[1e-9], [1e30]]),
            curvature_Vd=torch.zeros(2, 1, dtype=torch.float64),
            num_train=2,
            damping=1e-20,
        )
    assert caught.value.positions == (1,)
