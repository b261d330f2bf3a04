"""The empirical Fisher of a module, inverted exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.estimators.base import CurvatureEstimator
from workers.influence.estimators.parameters import parameter
from workers.influence.estimators.training import TrainingGradients


@dataclass(frozen=True)
class GaussNewton(CurvatureEstimator):
    """v_jᵀ (GᵀG/n + λ I)⁻¹ g_i with λ = damping · mean_k ‖g_k‖² / d, by one Cholesky per module.

    The matrix has d rows and columns, whatever the number of samples.
    """

    name = "gauss_newton"
    description = (
        "The exact inverse curvature of every module: the best single choice on language models "
        "with LoRA of low rank, aggregated by rank over all layers; a second pass over the "
        "training set."
    )

    damping: float = parameter(0.1, minimum=1e-4, maximum=100.0)

    def precondition(
        self, validation_Vd: Tensor, training: TrainingGradients, damping: float
    ) -> Tensor:
        curvature_dd = training.gram() / training.num_samples
        curvature_dd.diagonal().add_(damping)
        factor_dd = torch.linalg.cholesky(curvature_dd)
        return torch.cholesky_solve(validation_Vd.T, factor_dd).T
