"""Out-of-sample confidence: what a simple model says of each sample that has not seen its label.

The manner of Confident Learning (Northcutt et al. 2021) at a small part of its cost: the features
are the fine-tuned model's own, and only a logistic regression is fitted anew for every fold.

Shapes: T training samples, V validation samples, H features, C classes.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

NUM_FOLDS = 5
MAX_FITTED = 20_000
# Strong regularisation: the features have been trained on the same labels, wrong ones included.
INVERSE_PENALTY = 1e-3
_MAX_STEPS = 1000
Array = NDArray[Any]


@dataclass(frozen=True)
class OutOfSample:
    """Probabilities of the classes, float32.

    Attributes:
        train_TC: of every training sample, by the model of the other folds.
        validation_VC: of every validation sample, the mean over the folds' models.
    """

    train_TC: Tensor
    validation_VC: Tensor


class Features(Protocol):
    """The finite features of all training samples."""

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training indices [N] with their features [N, H], until all came."""
        ...

    def take(self, index_N: Tensor) -> Tensor:
        """Return the features of some samples, [N, H]."""
        ...


def predict_out_of_sample(
    train: Features,
    label_T: Tensor,
    validation_VH: Tensor,
    *,
    num_classes: int,
    seed: int,
    keep_alive: Callable[[], None] = lambda: None,
) -> OutOfSample:
    """Fit a logistic regression for every fold and let it answer for the others.

    Args:
        train: read once for every fold's fit, and once for what it answers.
        label_T: classes as given.
        validation_VH: finite features.
        num_classes: C; a class without samples outside a fold has probability 0 in it.
        seed: of the folds, and of the part of a larger training set that a fold is fitted on.
        keep_alive: is called between fits.
    """
    generator = torch.Generator().manual_seed(seed)
    # the samples of each class, dealt out in turn: every fold has its share of each
    order_T = torch.randperm(len(label_T), generator=generator)
    order_T = order_T[label_T[order_T].argsort(stable=True)]
    fold_T = torch.empty_like(label_T)
    fold_T[order_T] = torch.arange(len(label_T)) % NUM_FOLDS
    train_TC = np.zeros((len(label_T), num_classes), dtype=np.float32)
    validation_VC = np.zeros((len(validation_VH), num_classes), dtype=np.float32)
    validation = validation_VH.numpy()
    for fold in range(NUM_FOLDS):
        keep_alive()
        others = (fold_T != fold).nonzero().flatten()
        if not len(others):  # a single sample: nobody else can say anything of it
            continue
        if len(others) > MAX_FITTED:
            others = others[torch.randperm(len(others), generator=generator)[:MAX_FITTED]]
        predict = _fit(train.take(others).numpy(), label_T[others].numpy(), num_classes=num_classes)
        for index_N, feature_NH in train.blocks():
            is_held_out_N = fold_T[index_N] == fold
            rows = index_N[is_held_out_N].numpy()
            train_TC[rows] = predict(feature_NH[is_held_out_N].numpy())
        validation_VC += predict(validation) / NUM_FOLDS
    return OutOfSample(torch.from_numpy(train_TC), torch.from_numpy(validation_VC))


def _fit(features: Array, label: Array, *, num_classes: int) -> Callable[[Array], Array]:
    """Return what predicts the probability of every class."""
    classes = np.unique(label)
    if len(classes) > 1:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=_MAX_STEPS)
        )
        with warnings.catch_warnings():
            # the order of the confidences is what counts, and it settles long before
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features, label)

    def predict(asked: Array) -> Array:
        probability = np.zeros((len(asked), num_classes), dtype=np.float32)
        if len(asked):
            probability[:, classes] = model.predict_proba(asked) if len(classes) > 1 else 1.0
        return probability

    return predict
