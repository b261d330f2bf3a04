"""Outliers among the gradients of a class.

Shapes: V validation samples, C classes, B a block of training samples, N validation samples of one
class.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.estimators.base import ClassEstimator
from workers.influence.estimators.parameters import parameter

MAX_FITTED = 1000
"""Most validation samples of a class that its machine is fitted on."""

_MAX_NU = 0.999  # with 1 no sample stands on the boundary, which then has no place
_TOLERANCE = 1e-6  # far below scikit-learn's 1e-3, which lets rounding move the decision function


@dataclass(frozen=True)
class OutlierGradient(ClassEstimator):
    """Decision function of a one-class SVM on the validation gradients of a class, at g_i.

    After Chhabra et al. 2025. The kernel is exp(−γ ‖v − g‖²) with γ = 1 / mean ‖v‖² over the class,
    which is scikit-learn's "scale" for gradients whose entries have mean 0. Positive inside the
    class's gradients, negative outside: an outlier is a suspect.

    A fit takes time with the square of its samples. Of a class with more than 1,000 validation
    samples, 1,000 are taken, evenly spread over their order.
    """

    name = "outlier_gradient"
    description = (
        "Whether a gradient looks like those of trusted samples of a class: for few validation "
        "samples of each class and noise that makes outliers; classifiers only, mean or rank."
    )

    nu: float = parameter(0.5, minimum=0.01, maximum=1.0)

    def fit(
        self, *, gram_VV: Tensor, norm_V: Tensor, class_V: Tensor, num_classes: int
    ) -> dict[str, Tensor]:
        # a second of imports that nobody else should wait for
        from sklearn.svm import OneClassSVM  # noqa: PLC0415

        gram_VV, norm_V, class_V = gram_VV.cpu().double(), norm_V.cpu().double(), class_V.cpu()
        coefficient_CV = torch.zeros(num_classes, len(norm_V))
        intercept_C = torch.zeros(num_classes)
        gamma_C = torch.zeros(num_classes, dtype=torch.float64)  # of tiny gradients it is huge
        for label in range(num_classes):
            members_N = _spread((class_V == label).nonzero().flatten())
            mean_squared_norm = float(norm_V[members_N].square().sum()) / max(1, len(members_N))
            if mean_squared_norm == 0:
                continue
            gamma = 1 / mean_squared_norm
            kernel_NN = _kernel(
                gram_VV[members_N][:, members_N], norm_V[members_N], norm_V[members_N], gamma
            )
            machine = OneClassSVM(
                kernel="precomputed", nu=min(self.nu, _MAX_NU), tol=_TOLERANCE
            ).fit(kernel_NN.numpy())
            support_N = members_N[torch.from_numpy(machine.support_).long()]
            coefficient_CV[label, support_N] = torch.from_numpy(machine.dual_coef_[0]).float()
            intercept_C[label], gamma_C[label] = float(machine.intercept_[0]), gamma
        return {"coefficient": coefficient_CV, "gamma": gamma_C, "intercept": intercept_C}

    def influence(
        self,
        *,
        dot_VB: Tensor,
        norm_V: Tensor,
        train_norm_B: Tensor,
        fitted: Mapping[str, Tensor],
    ) -> Tensor:
        coefficient_CV = fitted["coefficient"].to(dot_VB.dtype)
        influence_CB = fitted["intercept"].to(dot_VB.dtype)[:, None].repeat(1, len(train_norm_B))
        for label, gamma in enumerate(fitted["gamma"].tolist()):
            members_N = coefficient_CV[label].nonzero().flatten()
            if len(members_N):
                kernel_NB = _kernel(dot_VB[members_N], norm_V[members_N], train_norm_B, gamma)
                influence_CB[label] += coefficient_CV[label, members_N] @ kernel_NB
        return influence_CB


def _spread(member_N: Tensor) -> Tensor:
    if len(member_N) <= MAX_FITTED:
        return member_N
    return member_N[torch.arange(MAX_FITTED) * len(member_N) // MAX_FITTED]


def _kernel(dot_NB: Tensor, left_norm_N: Tensor, right_norm_B: Tensor, gamma: float) -> Tensor:
    """Return exp(−γ ‖v − g‖²) from dot products and lengths."""
    # each factor is scaled on its own: the square of a small norm may underflow
    root = gamma**0.5
    left_N, right_B = left_norm_N * root, right_norm_B * root
    distance_NB = left_N.square()[:, None] + right_B.square() - 2 * (dot_NB * root * root)
    kernel_NB: Tensor = (-distance_NB.clamp(min=0)).exp()
    return kernel_NB
