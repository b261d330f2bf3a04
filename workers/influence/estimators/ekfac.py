"""EK-FAC: the empirical Fisher, diagonal in the eigenbasis of its Kronecker factors.

Shapes: N gradients, B a block of training samples, O/I rows and columns of a weight matrix,
d = O · I its entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.influence.estimators.base import CurvatureEstimator
from workers.influence.estimators.parameters import parameter
from workers.influence.estimators.training import TrainingGradients

_CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class _Eigenbasis:
    """An orthonormal basis of O × I matrices: products of a column of either factor."""

    output_OO: Tensor
    input_II: Tensor

    def enter(self, gradient_Nd: Tensor) -> Tensor:
        """Return the coordinates [N, d] of gradients."""
        return self._multiply(gradient_Nd, self.output_OO.T, self.input_II)

    def leave(self, coordinate_Nd: Tensor) -> Tensor:
        """Return the gradients [N, d] of coordinates."""
        return self._multiply(coordinate_Nd, self.output_OO, self.input_II.T)

    def _multiply(self, matrix_Nd: Tensor, left_OO: Tensor, right_II: Tensor) -> Tensor:
        matrix_NOI = matrix_Nd.unflatten(1, (len(self.output_OO), len(self.input_II)))
        left_OO, right_II = left_OO.to(matrix_Nd.dtype), right_II.to(matrix_Nd.dtype)
        product_NOI: Tensor = matrix_NOI @ right_II
        if matrix_NOI.shape[1] > matrix_NOI.shape[2]:
            # one product of all columns: N products with a few columns each are ten times as slow
            product_NOI = (product_NOI.mT @ left_OO.mT).mT
        else:
            product_NOI = left_OO @ product_NOI
        return product_NOI.flatten(1)


@dataclass(frozen=True)
class EKFAC(CurvatureEstimator):
    """EK-FAC (George et al. 2018; Grosse et al. 2023) on the empirical Fisher.

    With the eigenvectors Q_A of Σ x xᵀ and Q_S of Σ g gᵀ over all tokens, a gradient matrix has the
    coordinates Q_Sᵀ D Q_A. Their mean squares over the training samples stand for the eigenvalues
    of the curvature, to which λ = damping · mean_k ‖g_k‖² / d is added (the mean of the eigenvalues
    is mean_k ‖g_k‖² / d, whatever the basis). Vectors, and matrices without sums, are taken as they
    stand: the diagonal of the Fisher. So are those with a side beyond `MAX_SIDE` of
    `workers.influence.kronecker`, such as the head of a language model: nobody makes their sums.
    """

    name = "ekfac"
    description = (
        "The inverse curvature in the eigenbasis of its Kronecker factors: the best on causal "
        "language models, by mean over the middle blocks; a second pass over the training set."
    )
    needs_kronecker = True

    damping: float = parameter(0.1, minimum=1e-4, maximum=100.0)

    def precondition(
        self, validation_Vd: Tensor, training: TrainingGradients, damping: float
    ) -> Tensor:
        basis = _eigenbasis(training, validation_Vd.device)
        eigenvalue_d = validation_Vd.new_zeros(training.spec.num_parameters)
        for block_Bd in training.blocks():
            coordinate_Bd = basis.enter(block_Bd) if basis else block_Bd
            eigenvalue_d += coordinate_Bd.double().square().sum(dim=0)
        inverse_d = (eigenvalue_d / training.num_samples + damping).reciprocal()
        if basis is None:
            return validation_Vd * inverse_d
        step = max(1, _CHUNK_ENTRIES // training.spec.num_parameters)
        parts = []
        for part_Nd in validation_Vd.split(step):
            training.keep_alive()
            parts.append(basis.leave(basis.enter(part_Nd) * inverse_d))
        return torch.cat(parts)


def _eigenbasis(training: TrainingGradients, device: torch.device) -> _Eigenbasis | None:
    sums = training.kronecker
    if sums is None:
        return None
    shape = (len(sums.output_OO), len(sums.input_II))
    if training.spec.shape != shape:
        raise ValueError(
            f"module '{training.spec.name}' is {training.spec.shape}, its Kronecker sums are for "
            f"{shape}."
        )
    with training.uninterrupted():
        output_OO = _eigenvectors(sums.output_OO, device)
    with training.uninterrupted():
        input_II = _eigenvectors(sums.input_II, device)
    return _Eigenbasis(output_OO, input_II)


def _eigenvectors(sum_NN: Tensor, device: torch.device) -> Tensor:
    sum_NN = sum_NN.to(device, torch.float64)
    vectors_NN: Tensor = torch.linalg.eigh((sum_NN + sum_NN.T) / 2).eigenvectors
    return vectors_NN
