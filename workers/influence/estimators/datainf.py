"""DataInf: a closed-form inverse Hessian for small modules."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.estimators.base import CurvatureEstimator
from workers.influence.estimators.parameters import parameter
from workers.influence.estimators.training import TrainingGradients


@dataclass(frozen=True)
class DataInf(CurvatureEstimator):
    """DataInf (Kwon et al., ICLR 2024), with the sum over k running over all n training samples.

    influence = (1/λ) [ v_j·g_i − (1/n) Σ_k (v_j·g_k)(g_k·g_i) / (λ + ‖g_k‖²) ]
    with λ = damping · mean_k ‖g_k‖² / d. The sum over k is linear in g_i, so with the curvature
    c_j = Σ_k (v_j·g_k) g_k / (λ + ‖g_k‖²) influence is one dot product: (v_j − c_j/n)/λ · g_i.

    The bracket nearly cancels where gradients are nearly parallel, hence the float64.
    """

    name = "datainf"
    description = (
        "Takes the curvature of the loss into account in closed form: for adapters, aggregated by "
        "rank; a second pass over the training set."
    )

    damping: float = parameter(0.1, minimum=1e-4, maximum=100.0)

    def precondition(
        self, validation_Vd: Tensor, training: TrainingGradients, damping: float
    ) -> Tensor:
        curvature_Vd = torch.zeros_like(validation_Vd)
        for block_Bd in training.wide_blocks():
            weight_B = (torch.linalg.vecdot(block_Bd, block_Bd) + damping).reciprocal()
            curvature_Vd.addmm_((validation_Vd @ block_Bd.T) * weight_B, block_Bd)
        return (validation_Vd - curvature_Vd / training.num_samples) / damping
