"""The empirical Fisher of a module, inverted exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.estimators.base import CurvatureEstimator
from workers.influence.estimators.parameters import parameter
from workers.influence.estimators.training import TrainingGradients, check_gram_size
from workers.influence.layers import ModuleSpec


@dataclass(frozen=True)
class GaussNewton(CurvatureEstimator):
    """v_jᵀ (GᵀG/n + λ I)⁻¹ g_i with λ = damping · mean_k ‖g_k‖² / d, by one Cholesky per module.

    The matrix has d rows and columns, whatever the number of samples; memory holds the sum GᵀG and
    one more matrix of its size, which becomes the factor.
    """

    name = "gauss_newton"
    description = (
        "The exact inverse curvature of every module: the best single choice on language models "
        "that tell classes, aggregated by rank over all layers; a second pass over the training "
        "set."
    )

    damping: float = parameter(0.1, minimum=1e-4, maximum=100.0)

    def check_size(self, spec: ModuleSpec) -> None:
        check_gram_size(spec)

    def precondition(
        self, validation_Vd: Tensor, training: TrainingGradients, damping: float
    ) -> Tensor:
        # symmetric, and the other way round as LAPACK wants it: else it would be copied once more
        factor_dd = (training.gram() / training.num_samples).mT
        factor_dd.diagonal().add_(damping)
        with training.uninterrupted():
            torch.linalg.cholesky(factor_dd, out=factor_dd)
        # cholesky_solve would copy the factor
        with training.uninterrupted():
            half_Vd = torch.linalg.solve_triangular(
                factor_dd.mT, validation_Vd, upper=True, left=False
            )
        with training.uninterrupted():
            query_Vd: Tensor = torch.linalg.solve_triangular(
                factor_dd, half_Vd, upper=False, left=False
            )
        return query_Vd
