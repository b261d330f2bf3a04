from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.influence import estimator_oracles as oracles
from tests.influence.estimators.streams import assert_near, influence, randn, training
from workers.influence.estimators import TrainingGradients
from workers.influence.estimators.lissa import LiSSA, _largest_eigenvalue, _multiplication


def scale_of(stream: TrainingGradients) -> float:
    return _largest_eigenvalue(_multiplication(stream), stream, torch.device("cpu"))


def uneven(num_train: int, num_parameters: int, *, seed: int) -> Tensor:
    """Gradients whose curvature has eigenvalues of very different size."""
    return randn(num_train, num_parameters, seed=seed) * torch.logspace(0, -2, num_parameters)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    num_parameters=st.integers(1, 40),
    num_train=st.integers(1, 30),
    is_uneven=st.booleans(),
)
def test_the_scale_is_the_largest_eigenvalue_or_a_little_more(
    seed: int, num_parameters: int, num_train: int, is_uneven: bool
) -> None:
    """Also where more eigenvalues are close to one another than vectors are iterated."""
    make = uneven if is_uneven else randn
    train_Td = make(num_train, num_parameters, seed=seed)
    largest = float(torch.linalg.eigvalsh(oracles.fisher(train_Td))[-1])
    assert largest * (1 - 1e-6) <= scale_of(training(train_Td)) <= 1.06 * largest


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_equals_the_recursion_sample_by_sample(steps: int) -> None:
    train_Td, validation_Vd = uneven(9, 5, seed=0), randn(3, 5, seed=1)
    stream = training(train_Td, cuts=[4])
    scale = scale_of(stream) + oracles.damping_of(train_Td, 0.1)
    assert_near(
        influence(LiSSA(steps=steps), validation_Vd, stream),
        oracles.lissa(validation_Vd, train_Td, scale=scale, steps=steps),
    )


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 1000), num_parameters=st.integers(1, 8), num_train=st.integers(1, 12))
def test_many_steps_solve_the_damped_system(seed: int, num_parameters: int, num_train: int) -> None:
    """The damping is added: subtracting it, as is often done, solves another system."""
    train_Td = uneven(num_train, num_parameters, seed=seed)
    validation_Vd = randn(3, num_parameters, seed=seed + 1)
    system_dd = oracles.fisher(train_Td)
    system_dd += oracles.damping_of(train_Td, 0.1) * torch.eye(num_parameters, dtype=torch.float64)
    query_Vd = LiSSA(steps=2000).queries(validation_Vd=validation_Vd, training=training(train_Td))
    expected_Vd = torch.linalg.solve(system_dd, validation_Vd.double().T).T
    assert_near(query_Vd, expected_Vd, share=1e-5)


def test_a_module_too_large_for_its_matrix_is_streamed() -> None:
    train_Td, validation_Vd = uneven(9, 12, seed=2), randn(3, 12, seed=3)
    assert_near(
        influence(LiSSA(), validation_Vd, training(train_Td, cuts=[2, 6], max_gram_bytes=1)),
        influence(LiSSA(), validation_Vd, training(train_Td)),
        share=1e-6,
    )


@pytest.mark.parametrize("max_gram_bytes", [10**9, 1], ids=["matrix", "stream"])
@pytest.mark.parametrize("steps", [1, 10, 300, 10_000])
def test_it_ends_where_nothing_changes_any_more(steps: int, max_gram_bytes: int) -> None:
    """The queries are those of all the steps; a slow one beside a fast one is waited for."""
    train_Td = uneven(30, 6, seed=4)
    validation_Vd = torch.stack([*torch.eye(6)[[0, 5]], torch.zeros(6)])
    num_calls = 0

    def keep_alive() -> None:
        nonlocal num_calls
        num_calls += 1

    stream = replace(training(train_Td, max_gram_bytes=max_gram_bytes), keep_alive=keep_alive)
    damping = oracles.damping_of(train_Td, 0.1)
    scale = scale_of(stream) + damping
    system_dd = oracles.fisher(train_Td) + damping * torch.eye(6, dtype=torch.float64)
    expected_Vd = validation_Vd.double()
    for _ in range(steps):
        expected_Vd = validation_Vd + expected_Vd - expected_Vd @ system_dd / scale
    num_calls = 0
    actual_Vd = LiSSA(steps=steps).precondition(validation_Vd.double(), stream, damping)
    for actual_d, expected_d in zip(actual_Vd, expected_Vd / scale, strict=True):
        assert float((actual_d - expected_d).norm()) <= 2e-9 * float(expected_d.norm())
    assert min(steps, 100) <= num_calls < 1200
