"""DataInf: a closed-form inverse Hessian for small modules."""

import torch
from torch import Tensor

from workers.influence.errors import NonFiniteInfluence
from workers.influence.estimators.base import CurvatureEstimator

_DAMPING_SHARE = 0.1


class DataInf(CurvatureEstimator):
    """DataInf (Kwon et al., ICLR 2024), with the sum over k running over all n training samples.

    influence = (1/λ) [ v_j·g_i − (1/n) Σ_k (v_j·g_k)(g_k·g_i) / (λ + ‖g_k‖²) ]
    with λ = mean_k ‖g_k‖² / (10 d). The sum over k is linear in g_i, so with the curvature
    c_j = Σ_k (v_j·g_k) g_k / (λ + ‖g_k‖²) influence is one dot product: (v_j − c_j/n)/λ · g_i.

    The bracket nearly cancels where gradients are nearly parallel, hence the float64.
    """

    name = "datainf"
    description = (
        "Takes the curvature of the loss into account: strongest on language models with LoRA, "
        "aggregated by rank or vote; a second pass over the training set."
    )

    def damping(self, *, mean_squared_norm: float, num_parameters: int) -> float:
        return _DAMPING_SHARE * mean_squared_norm / num_parameters

    def partial_curvature(
        self, *, validation_Vd: Tensor, train_Bd: Tensor, damping: float
    ) -> Tensor:
        train_Bd = train_Bd.double()
        squared_norm_B: Tensor = torch.linalg.vecdot(train_Bd, train_Bd)
        denominator_B = squared_norm_B + damping
        weight_B = denominator_B.reciprocal().masked_fill(denominator_B == 0, 0.0)
        return ((validation_Vd.double() @ train_Bd.T) * weight_B) @ train_Bd

    def precondition(
        self, *, validation_Vd: Tensor, curvature_Vd: Tensor, num_train: int, damping: float
    ) -> Tensor:
        if damping == 0:
            # every training gradient of the module is zero: it tells nothing
            return torch.zeros_like(validation_Vd, dtype=torch.float32)
        query_Vd = ((validation_Vd.double() - curvature_Vd / num_train) / damping).float()
        broken_V = ~torch.isfinite(query_Vd).all(dim=1)
        if bool(broken_V.any()):
            raise NonFiniteInfluence(
                "the preconditioned validation gradient",
                positions=broken_V.nonzero().flatten().tolist(),
            )
        return query_Vd
