"""Out-of-sample confidence: what a simple model says of each sample that has not seen its label.

The manner of Confident Learning (Northcutt et al. 2021) at a small part of its cost: the features
are the fine-tuned model's own, and only a logistic regression is fitted anew for every fold.

Shapes: T samples, H features, C classes.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
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
_ROWS = 50_000


def out_of_sample_probability(
    features_TH: Tensor,
    label_T: Tensor,
    *,
    num_classes: int,
    seed: int,
    keep_alive: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the probability of every class for every sample, by a model of the other folds.

    Args:
        features_TH: finite.
        label_T: classes as given.
        num_classes: C; a class without samples outside a fold has probability 0 in it.
        seed: of the folds, and of the part of a larger training set that a fold is fitted on.
        keep_alive: is called between fits.

    Returns:
        probability_TC, float32; the given class everywhere if there is only one.
    """
    generator = torch.Generator().manual_seed(seed)
    # the samples of each class, drawn in turn: every fold has its share of each
    order_T = torch.randperm(len(label_T), generator=generator)
    order_T = order_T[label_T[order_T].argsort(stable=True)]
    fold_T = torch.empty_like(label_T)
    fold_T[order_T] = torch.arange(len(label_T)) % NUM_FOLDS
    features, label = features_TH.numpy(), label_T.numpy()
    probability_TC = np.zeros((len(label), num_classes), dtype=np.float32)
    for fold in range(NUM_FOLDS):
        keep_alive()
        others = (fold_T != fold).nonzero().flatten()
        if len(others) > MAX_FITTED:
            others = others[torch.randperm(len(others), generator=generator)[:MAX_FITTED]]
        held_out = (fold_T == fold).nonzero().flatten().numpy()
        _fill(probability_TC, features, label, fitted=others.numpy(), asked=held_out)
    return torch.from_numpy(probability_TC)


def _fill(
    probability_TC: np.ndarray,
    features: np.ndarray,
    label: np.ndarray,
    *,
    fitted: np.ndarray,
    asked: np.ndarray,
) -> None:
    classes = np.unique(label[fitted])
    if len(classes) < 2:  # noqa: PLR2004 - nothing to tell apart
        probability_TC[np.ix_(asked, classes)] = 1.0
        return
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=_MAX_STEPS)
    )
    with warnings.catch_warnings():
        # the ranking of confidences is what counts, and it settles long before
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[fitted], label[fitted])
    for start in range(0, len(asked), _ROWS):
        rows = asked[start : start + _ROWS]
        probability_TC[np.ix_(rows, classes)] = model.predict_proba(features[rows])
