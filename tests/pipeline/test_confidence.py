"""Out-of-sample confidence equals scikit-learn's cross-validation, fold by fold.

Shapes: T training samples, V validation samples, H features, C classes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tests.pipeline.held import Held
from workers.pipeline import confidence
from workers.pipeline.confidence import NUM_FOLDS, OutOfSample, predict_out_of_sample

NUM_CLASSES = 4
Array = NDArray[Any]


def draw(
    num_train: int, *, classes: tuple[int, ...] = (0, 1, 2), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw features that tell the class, and classes; the first feature is the sample's number."""
    generator = torch.Generator().manual_seed(seed)
    label_T = torch.tensor(classes)[torch.randint(len(classes), (num_train,), generator=generator)]
    train_TH = torch.randn(num_train, 6, generator=generator) + label_T[:, None]
    train_TH[:, 0] = torch.arange(num_train)
    validation_VH = torch.randn(9, 6, generator=generator) + 1
    return train_TH, label_T, validation_VH


def predict(
    train_TH: Tensor, label_T: Tensor, validation_VH: Tensor, **options: Any
) -> OutOfSample:
    num_shards = options.pop("num_shards", 1)
    options = {"num_classes": NUM_CLASSES, "seed": 3, **options}
    return predict_out_of_sample(Held(train_TH, num_shards), label_T, validation_VH, **options)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The samples that each fold's model was fitted on, by the number in their first feature."""
    seen: list[set[int]] = []
    fit = confidence._fit

    def spy(features: Array, label: Array, **options: Any) -> Callable[[Array], Array]:
        seen.append({int(number) for number in features[:, 0]})
        assert len(seen[-1]) == len(label)
        return fit(features, label, **options)

    monkeypatch.setattr(confidence, "_fit", spy)
    return seen


def folds_of(fitted: list[set[int]], num_train: int) -> list[int]:
    """Return which fold's model answers for each sample: the one that has not seen it."""
    everyone = set(range(num_train))
    held_out = [everyone - members for members in fitted]
    assert sum(map(len, held_out)) == num_train, "every sample is held out once"
    assert set().union(*held_out) == everyone
    return [
        next(fold for fold, members in enumerate(held_out) if sample in members)
        for sample in range(num_train)
    ]


def the_model() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=1000))


@pytest.mark.parametrize("num_train", [11, 60])
def test_the_answers_are_those_of_scikit_learns_cross_validation(
    fitted: list[set[int]], num_train: int
) -> None:
    """Of the three classes that have samples; the fourth has none, and no probability."""
    train_TH, label_T, validation_VH = draw(num_train)
    found = predict(train_TH, label_T, validation_VH)
    fold_T = folds_of(fitted, num_train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that a fold's model has not seen
        expected = cross_val_predict(
            the_model(),
            train_TH.numpy(),
            label_T.numpy(),
            cv=PredefinedSplit(fold_T),
            method="predict_proba",
        )
    np.testing.assert_allclose(found.train_TC[:, :3], expected, rtol=1e-5, atol=1e-6)
    assert not found.train_TC[:, 3].any()
    torch.testing.assert_close(found.train_TC.sum(dim=1), torch.ones(num_train))
    assert found.train_TC.dtype == found.validation_VC.dtype == torch.float32


def test_validation_samples_get_the_mean_of_all_models(fitted: list[set[int]]) -> None:
    train_TH, label_T, validation_VH = draw(40)
    found = predict(train_TH, label_T, validation_VH)
    answers = []
    for members in fitted:
        rows = sorted(members)
        model = the_model().fit(train_TH[rows].numpy(), label_T[rows].numpy())
        answers.append(model.predict_proba(validation_VH.numpy()))
    mean_VC = np.mean(answers, axis=0)
    np.testing.assert_allclose(found.validation_VC[:, :3], mean_VC, rtol=1e-4, atol=1e-5)
    assert not found.validation_VC[:, 3].any()


def test_the_only_sample_of_a_class_is_answered_by_a_model_that_has_not_heard_of_it(
    fitted: list[set[int]],
) -> None:
    train_TH, label_T, validation_VH = draw(30)
    label_T[17] = 3
    found = predict(train_TH, label_T, validation_VH)
    fold_T = folds_of(fitted, 30)
    has_not_heard_T = torch.tensor([fold == fold_T[17] for fold in fold_T])
    assert torch.equal(found.train_TC[:, 3] == 0, has_not_heard_T)
    assert 1 < int(has_not_heard_T.sum()) < 30


def test_a_sample_counts_in_the_answers_for_other_folds_alone(fitted: list[set[int]]) -> None:
    train_TH, label_T, validation_VH = draw(30)
    before = predict(train_TH, label_T, validation_VH).train_TC
    fold_T = torch.tensor(folds_of(fitted, 30))
    train_TH[8, 1:] = 50.0
    after = predict(train_TH, label_T, validation_VH).train_TC
    is_other_T = torch.arange(30) != 8
    is_same_T = (before == after).all(dim=1)
    assert torch.equal(is_same_T[is_other_T], fold_T[is_other_T] == fold_T[8])


@pytest.mark.parametrize("num_train", [7, 53, 100])
def test_every_fold_has_its_share_of_every_class(fitted: list[set[int]], num_train: int) -> None:
    train_TH, label_T, validation_VH = draw(num_train)
    predict(train_TH, label_T, validation_VH)
    fold_T = torch.tensor(folds_of(fitted, num_train))
    for label in (0, 1, 2):
        count_F = fold_T[label_T == label].bincount(minlength=NUM_FOLDS)
        assert int(count_F.max() - count_F.min()) <= 1
    count_F = fold_T.bincount(minlength=NUM_FOLDS)
    assert int(count_F.max() - count_F.min()) <= 1


def test_the_seed_decides_the_folds_alone(fitted: list[set[int]]) -> None:
    samples = draw(40)
    one, again = predict(*samples, seed=1), predict(*samples, seed=1)
    assert torch.equal(one.train_TC, again.train_TC)
    assert torch.equal(one.validation_VC, again.validation_VC)
    other = predict(*samples, seed=2)
    assert folds_of(fitted[:5], 40) == folds_of(fitted[5:10], 40) != folds_of(fitted[10:], 40)
    torch.testing.assert_close(other.train_TC, one.train_TC, rtol=0, atol=0.1)


def test_a_large_training_set_is_fitted_in_part_and_answered_in_pieces(
    fitted: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = draw(60)
    whole = predict(*samples)
    fold_T = folds_of(fitted, 60)
    assert torch.equal(predict(*samples, num_shards=7).train_TC, whole.train_TC)
    monkeypatch.setattr(confidence, "MAX_FITTED", 20)
    calls: list[None] = []
    part = predict(*samples, keep_alive=lambda: calls.append(None))
    assert len(calls) == NUM_FOLDS
    for fold, members in enumerate(fitted[-NUM_FOLDS:]):
        assert len(members) == 20
        assert all(fold_T[sample] != fold for sample in members)
    torch.testing.assert_close(part.train_TC.sum(dim=1), torch.ones(60))


def test_one_class_is_certain() -> None:
    train_TH, label_T, validation_VH = draw(12, classes=(2,))
    found = predict(train_TH, label_T, validation_VH)
    for probability in (found.train_TC, found.validation_VC):
        certain = torch.zeros_like(probability)
        certain[:, 2] = 1
        torch.testing.assert_close(probability, certain)


@pytest.mark.parametrize("num_train", [1, 2, 3, 4])
def test_of_a_few_samples_something_is_said(num_train: int) -> None:
    """Nobody can say anything of the only one."""
    train_TH, _, validation_VH = draw(num_train)
    found = predict(train_TH, torch.arange(num_train), validation_VH)
    is_told_T = torch.full((num_train,), float(num_train > 1))
    torch.testing.assert_close(found.train_TC.sum(dim=1), is_told_T)
    assert not found.train_TC.gather(1, torch.arange(num_train)[:, None]).any()
    assert 0 <= float(found.validation_VC.min()) <= float(found.validation_VC.max()) <= 1


def test_features_that_say_nothing_and_an_empty_validation_set() -> None:
    label_T = torch.arange(20) % 2
    found = predict(torch.ones(20, 3), label_T, torch.ones(0, 3))
    assert found.validation_VC.shape == (0, NUM_CLASSES)
    torch.testing.assert_close(found.train_TC[:, :2], torch.full((20, 2), 0.5), rtol=0, atol=0.01)
