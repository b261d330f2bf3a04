"""LiSSA: the inverse of the empirical Fisher by a truncated series."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.estimators.base import CurvatureEstimator
from workers.influence.estimators.parameters import parameter
from workers.influence.estimators.training import TrainingGradients

_POWER_STEPS = 10
_POWER_ROWS = 8
_SAFETY = 1.05
_TOLERANCE = 1e-9  # of a query, which is handed on in float32


@dataclass(frozen=True)
class LiSSA(CurvatureEstimator):
    """LiSSA (Agarwal et al. 2017; Koh and Liang 2017) on the whole training set.

    r ← v + r − (1/σ) (mean_k (g_k·r) g_k + λ r) from r = v, `steps` times; the query is r/σ, which
    tends to (GᵀG/n + λ I)⁻¹ v. λ = damping · mean_k ‖g_k‖² / d, and σ is the largest eigenvalue of
    the bracket, taken a little too large, for with less than half of it the series diverges.

    The steps end early where all that remain would change no query by more than 1e-9 of its length:
    every change is shorter than the one before it, by λ/σ at least.
    """

    name = "lissa"
    description = (
        "The inverse curvature by a few steps of a series, between grad_dot and gauss_newton: to "
        "compare with published results; gauss_newton costs less and is exact."
    )

    damping: float = parameter(0.1, minimum=1e-4, maximum=100.0)
    steps: int = parameter(10, minimum=1, maximum=10_000)

    def precondition(
        self, validation_Vd: Tensor, training: TrainingGradients, damping: float
    ) -> Tensor:
        multiply = _multiplication(training)
        scale = _largest_eigenvalue(multiply, training, validation_Vd.device) + damping
        r_Vd = validation_Vd
        for step in range(1, self.steps + 1):
            training.keep_alive()
            change_Vd = validation_Vd - (multiply(r_Vd) + damping * r_Vd) / scale
            r_Vd = r_Vd + change_Vd
            # the sum of a geometric series, or of as many equal terms
            num_changes = min(self.steps - step, scale / damping)
            rest_V = num_changes * torch.linalg.vector_norm(change_Vd, dim=1)
            if bool((rest_V <= _TOLERANCE * torch.linalg.vector_norm(r_Vd, dim=1)).all()):
                break
        return r_Vd / scale


def _multiplication(training: TrainingGradients) -> Callable[[Tensor], Tensor]:
    """Return what multiplies rows [N, d] by GᵀG/n: the matrix, or a pass where it is too large."""
    if training.fits_gram:
        gram_dd = training.gram()
        return lambda r_Nd: r_Nd @ gram_dd / training.num_samples

    def stream(r_Nd: Tensor) -> Tensor:
        result_Nd = torch.zeros_like(r_Nd)
        for block_Bd in training.wide_blocks():
            result_Nd.addmm_(r_Nd @ block_Bd.T, block_Bd)
        return result_Nd / training.num_samples

    return stream


def _largest_eigenvalue(
    multiply: Callable[[Tensor], Tensor], training: TrainingGradients, device: torch.device
) -> float:
    """Return the largest eigenvalue of GᵀG/n, or a little more; never more than its trace.

    Several vectors at once (subspace iteration) come near it in a few steps, also where the largest
    eigenvalues are close to one another.
    """
    num_rows = min(_POWER_ROWS, training.spec.num_parameters)
    # drawn on the CPU, so that every device starts from the same vectors
    start_Kd = torch.randn(
        num_rows,
        training.spec.num_parameters,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    basis_Kd = torch.linalg.qr(start_Kd.T).Q.T
    for _ in range(_POWER_STEPS):
        training.keep_alive()
        basis_Kd = torch.linalg.qr(multiply(basis_Kd).T).Q.T
    ritz_KK = multiply(basis_Kd) @ basis_Kd.T
    estimate = float(torch.linalg.eigvalsh((ritz_KK + ritz_KK.T) / 2)[-1])
    return min(_SAFETY * estimate, training.mean_squared_norm)
