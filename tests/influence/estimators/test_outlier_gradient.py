import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import OneClassSVM
from torch import Tensor

from tests.influence.estimators.streams import randn
from workers.influence.estimators import outlier_gradient as module
from workers.influence.estimators.outlier_gradient import OutlierGradient


def influence(
    validation_Vd: Tensor,
    class_V: Tensor,
    train_Bd: Tensor,
    *,
    num_classes: int = 2,
    nu: float = 0.5,
) -> Tensor:
    estimator = OutlierGradient(nu=nu)
    norm_V = validation_Vd.norm(dim=1)
    fitted = estimator.fit(
        gram_VV=validation_Vd @ validation_Vd.T,
        norm_V=norm_V,
        class_V=class_V,
        num_classes=num_classes,
    )
    assert all(each.is_contiguous() for each in fitted.values())
    return estimator.influence(
        dot_VB=validation_Vd @ train_Bd.T,
        norm_V=norm_V,
        train_norm_B=train_Bd.norm(dim=1),
        fitted=fitted,
    )


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    nu=st.sampled_from([0.1, 0.5, 0.9]),
    exponent=st.integers(-12, 6),
)
def test_equals_scikit_learn_on_the_gradients_themselves(
    seed: int, nu: float, exponent: int
) -> None:
    scale = 10.0**exponent
    validation_Vd = randn(14, 5, seed=seed, scale=scale) + 0.5 * scale
    train_Bd = randn(9, 5, seed=seed + 1, scale=scale)
    class_V = torch.arange(14) % 2
    influence_CB = influence(validation_Vd, class_V, train_Bd, nu=nu)
    for label in (0, 1):
        members = validation_Vd[class_V == label].double().numpy()
        gamma = 1 / np.square(members).sum(axis=1).mean()
        machine = OneClassSVM(gamma=gamma, nu=nu, tol=1e-6).fit(members)
        expected_B = machine.decision_function(train_Bd.double().numpy())
        np.testing.assert_allclose(influence_CB[label].numpy(), expected_B, rtol=0, atol=1e-4)


def test_the_scale_is_scikit_learns_for_centred_entries() -> None:
    gradients = randn(20, 50, seed=0)
    gradients -= gradients.mean()
    machine = OneClassSVM(gamma="scale", tol=1e-6).fit(gradients.double().numpy())
    expected_B = machine.decision_function(gradients.double().numpy())
    influence_CB = influence(gradients, torch.zeros(20).long(), gradients, num_classes=1)
    np.testing.assert_allclose(influence_CB[0].numpy(), expected_B, rtol=0, atol=1e-4)


def test_planted_outliers_are_the_suspects() -> None:
    """Negative outside, positive inside: the sign of this whole project."""
    validation_Vd = randn(40, 8, seed=1, scale=0.3) + 1
    inside_Bd = randn(10, 8, seed=2, scale=0.3) + 1
    outside_Bd = -inside_Bd
    influence_CB = influence(
        validation_Vd,
        torch.zeros(40).long(),
        torch.cat([inside_Bd, outside_Bd]),
        num_classes=1,
        nu=0.1,
    )
    assert (influence_CB[0, :10] > influence_CB[0, 10:].max()).all()
    assert influence_CB[0, :10].median() > 0
    assert (influence_CB[0, 10:] < 0).all()


def test_the_length_of_all_gradients_does_not_matter() -> None:
    validation_Vd, train_Bd = randn(12, 4, seed=3), randn(5, 4, seed=4)
    class_V = torch.arange(12) % 3
    before_CB = influence(validation_Vd, class_V, train_Bd, num_classes=3)
    after_CB = influence(2**-30 * validation_Vd, class_V, 2**-30 * train_Bd, num_classes=3)
    torch.testing.assert_close(after_CB, before_CB, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 1])
def test_only_samples_of_the_class_count(label: int) -> None:
    """Those that are left out carry −1."""
    validation_Vd, train_Bd = randn(12, 4, seed=5), randn(5, 4, seed=6)
    class_V = torch.tensor([0] * 8 + [label] * 4)
    all_CB = influence(validation_Vd, class_V, train_Bd)
    alone_CB = influence(validation_Vd[:8], class_V[:8], train_Bd)
    torch.testing.assert_close(all_CB[0], alone_CB[0], rtol=0, atol=1e-5)


def test_classes_that_tell_nothing_give_zeros() -> None:
    """Without validation samples, or with zero gradients alone."""
    validation_Vd = torch.cat([randn(6, 4, seed=7), torch.zeros(3, 4)])
    class_V = torch.tensor([0] * 6 + [1] * 3)
    influence_CB = influence(validation_Vd, class_V, randn(5, 4, seed=8), num_classes=3)
    assert influence_CB[0].any()
    assert torch.equal(influence_CB[1:], torch.zeros(2, 5))


def test_one_validation_sample_is_enough() -> None:
    """The nearer, the better."""
    train_Bd = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0]])
    influence_CB = influence(
        torch.tensor([[1.0, 0.0]]), torch.zeros(1).long(), train_Bd, num_classes=1
    )
    assert torch.isfinite(influence_CB).all()
    assert influence_CB[0].argsort(descending=True).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_members", "chosen"), [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 3]), (10, [0, 2, 5, 7])]
)
def test_of_many_samples_some_are_fitted(
    monkeypatch: pytest.MonkeyPatch, num_members: int, chosen: list[int]
) -> None:
    """Evenly spread over those of the class; nothing but those chosen counts."""
    monkeypatch.setattr(module, "MAX_FITTED", 4)
    # every second sample is of another class
    validation_Vd, train_Bd = randn(2 * num_members, 4, seed=9), randn(5, 4, seed=10)
    class_V = torch.arange(2 * num_members) % 2
    actual_CB = influence(validation_Vd, class_V, train_Bd)
    for label in (0, 1):
        alone_Vd = validation_Vd[class_V == label][chosen]
        alone_CB = influence(alone_Vd, torch.zeros(4).long(), train_Bd, num_classes=1)
        torch.testing.assert_close(actual_CB[label], alone_CB[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_members", [1, 2, 9])
def test_every_share_of_outliers_is_possible(num_members: int) -> None:
    """All of them included: scikit-learn finds no place for the boundary then."""
    validation_Vd, class_V = randn(num_members, 4, seed=12), torch.zeros(num_members).long()
    for nu in (0.01, 1.0):
        influence_CB = influence(validation_Vd, class_V, validation_Vd, num_classes=1, nu=nu)
        assert torch.isfinite(influence_CB).all()
        if nu == 1:
            assert influence_CB.max() < 1e-3


def test_a_fit_takes_a_thousand_samples() -> None:
    validation_Vd = randn(1100, 3, seed=11)
    norm_V = validation_Vd.norm(dim=1)
    fitted = OutlierGradient(nu=1.0).fit(
        gram_VV=validation_Vd @ validation_Vd.T,
        norm_V=norm_V,
        class_V=torch.zeros(1100).long(),
        num_classes=1,
    )
    # with ν near 1 nearly every sample is a support vector
    assert 998 <= int(fitted["coefficient"].count_nonzero()) <= 1000
