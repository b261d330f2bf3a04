import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.influence import estimator_oracles as oracles
from tests.influence.estimators.streams import assert_near, influence, randn, training
from workers.influence.estimators import ekfac as module
from workers.influence.estimators.ekfac import EKFAC
from workers.influence.kronecker import KroneckerSums


def tokens(num_samples: int, size: int, *, seed: int, num_tokens: int = 4) -> Tensor:
    """Features of very different size, as activations have."""
    return randn(num_samples, num_tokens, size, seed=seed) * torch.logspace(0, -1, size)


def matrices(x_NSI: Tensor, g_NSO: Tensor) -> Tensor:
    return torch.stack([g_SO.T @ x_SI for x_SI, g_SO in zip(x_NSI, g_NSO, strict=True)]).flatten(1)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    num_inputs=st.integers(1, 6),
    num_outputs=st.integers(1, 5),
    num_train=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 9), max_size=3).map(sorted),
)
def test_equals_the_dense_kronecker_product(
    seed: int, num_inputs: int, num_outputs: int, num_train: int, cuts: list[int]
) -> None:
    """Also where there are fewer tokens than features, so that a factor is singular."""
    num_tokens = 1 + seed % 4
    x_TSI = tokens(num_train, num_inputs, seed=seed, num_tokens=num_tokens)
    g_TSO = tokens(num_train, num_outputs, seed=seed + 1, num_tokens=num_tokens)
    validation_Vd = matrices(
        tokens(3, num_inputs, seed=seed + 2), tokens(3, num_outputs, seed=seed + 3)
    )
    train_Td = matrices(x_TSI, g_TSO)
    sums = KroneckerSums.of_tokens(
        x_TSI.flatten(0, 1), g_TSO.flatten(0, 1), num_tokens=num_train * num_tokens
    )
    stream = training(train_Td, cuts=cuts, shape=(num_outputs, num_inputs), kronecker=sums)
    expected_VT = oracles.ekfac(validation_Vd, train_Td, factors=(sums.output_OO, sums.input_II))
    assert_near(influence(EKFAC(), validation_Vd, stream), expected_VT, share=1e-4)


def test_independent_inputs_and_gradients_need_no_correction() -> None:
    """With one token a sample and x independent of g, EK-FAC comes near the exact inverse."""
    x_TSI, g_TSO = randn(4000, 1, 3, seed=0), randn(4000, 1, 2, seed=1)
    train_Td, validation_Vd = matrices(x_TSI, g_TSO), randn(3, 6, seed=2)
    sums = KroneckerSums.of_tokens(x_TSI.flatten(0, 1), g_TSO.flatten(0, 1), num_tokens=4000)
    actual_VT = influence(EKFAC(), validation_Vd, training(train_Td, shape=(2, 3), kronecker=sums))
    expected_VT = oracles.gauss_newton(validation_Vd, train_Td)
    assert float((actual_VT - expected_VT).norm() / expected_VT.norm()) < 0.1


def test_validation_samples_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TSI, g_TSO = tokens(5, 3, seed=3), tokens(5, 2, seed=4)
    sums = KroneckerSums.of_tokens(x_TSI.flatten(0, 1), g_TSO.flatten(0, 1), num_tokens=20)
    stream = training(matrices(x_TSI, g_TSO), shape=(2, 3), kronecker=sums)
    validation_Vd = randn(5, 6, seed=5)
    whole_Vd = EKFAC().queries(validation_Vd=validation_Vd, training=stream)
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 13)
    parts_Vd = EKFAC().queries(validation_Vd=validation_Vd, training=stream)
    assert_near(parts_Vd, whole_Vd, share=1e-6)


def test_sums_of_another_module_are_refused() -> None:
    sums = KroneckerSums.of_tokens(torch.ones(1, 2), torch.ones(1, 3), num_tokens=1)
    stream = training(torch.ones(2, 6), shape=(2, 3), kronecker=sums)
    with pytest.raises(ValueError, match=r"\(2, 3\), its Kronecker sums are for \(3, 2\)"):
        EKFAC().queries(validation_Vd=torch.ones(1, 6), training=stream)


def test_a_matrix_without_sums_has_the_diagonal_fisher() -> None:
    """As one with too long a side, whose sums nobody makes."""
    train_Td, validation_Vd = randn(7, 6, seed=6), randn(3, 6, seed=7)
    actual_VT = influence(EKFAC(), validation_Vd, training(train_Td, shape=(3, 2)))
    eigenvalue_d = oracles.fisher(train_Td).diagonal() + oracles.damping_of(train_Td, 0.1)
    assert_near(actual_VT, (validation_Vd / eigenvalue_d) @ train_Td.double().T)
