"""Slow, obvious versions of the estimators: loops over pairs of samples, dense matrices.

Shapes: T training samples, V validation samples, d entries of a module, O/I rows and columns of a
weight matrix, S tokens, W words of the vocabulary, H width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pairs(
    validation_Vd: Tensor, train_Td: Tensor, of_pair: Callable[[Tensor, Tensor], float]
) -> Tensor:
    """Apply a function of two vectors to every pair, float64 [V, T]."""
    rows = [[of_pair(v, g) for g in train_Td.double()] for v in validation_Vd.double()]
    return torch.tensor(rows, dtype=torch.float64).view(len(validation_Vd), len(train_Td))


def cosine(v: Tensor, g: Tensor) -> float:
    """Cosine of two vectors, 0 where one of them is zero."""
    if not v.any() or not g.any():
        return 0.0
    v, g = v / v.abs().max(), g / g.abs().max()
    return float(v @ g) / math.sqrt(float(v @ v) * float(g @ g))


def covariance(v: Tensor, g: Tensor) -> float:
    """Covariance of the entries of two vectors, over d − 1; 0 for a single entry."""
    if len(v) == 1:
        return 0.0
    return float(torch.cov(torch.stack([v, g]))[0, 1])


def datainf_self(v: Tensor, g: Tensor) -> float:
    """vᵀ (g gᵀ + λ I)⁻¹ g with λ = 0.1 ‖g‖² / d, by the matrix; 0 where g is zero."""
    if not g.any():
        return 0.0
    identity = torch.eye(len(g), dtype=torch.float64)
    hessian = torch.outer(g, g) + 0.1 * float(g @ g) / len(g) * identity
    return float(v @ torch.linalg.solve(hessian, g))


def damping_of(train_Td: Tensor, share: float) -> float:
    """λ: a share of the mean of ‖g‖² / d."""
    return share * sum(float(g @ g) for g in train_Td.double()) / train_Td.numel()


def datainf(validation_Vd: Tensor, train_Td: Tensor, *, damping: float = 0.1) -> Tensor:
    """DataInf by its double sum over single samples."""
    shift = damping_of(train_Td, damping)
    train = list(train_Td.double())

    def of_pair(v: Tensor, g: Tensor) -> float:
        total = sum(float(v @ k) * float(k @ g) / (shift + float(k @ k)) for k in train)
        return (float(v @ g) - total / len(train)) / shift

    return pairs(validation_Vd, train_Td, of_pair)


def fisher(train_Td: Tensor) -> Tensor:
    """Mean of g gᵀ, one sample after the other."""
    total_dd = torch.zeros(train_Td.shape[1], train_Td.shape[1], dtype=torch.float64)
    for g in train_Td.double():
        total_dd += torch.outer(g, g)
    return total_dd / len(train_Td)


def gauss_newton(validation_Vd: Tensor, train_Td: Tensor, *, damping: float = 0.1) -> Tensor:
    """v · inv(Fisher + λ I) g with the inverse written out."""
    d = train_Td.shape[1]
    inverse_dd = torch.linalg.inv(
        fisher(train_Td) + damping_of(train_Td, damping) * torch.eye(d, dtype=torch.float64)
    )
    return pairs(validation_Vd, train_Td, lambda v, g: float(v @ (inverse_dd @ g)))


def lissa(
    validation_Vd: Tensor, train_Td: Tensor, *, scale: float, steps: int, damping: float = 0.1
) -> Tensor:
    """LiSSA's recursion, sample by sample, with σ = `scale`."""
    shift = damping_of(train_Td, damping)
    train = list(train_Td.double())

    def query(v: Tensor) -> Tensor:
        r = v
        for _ in range(steps):
            product = torch.zeros_like(r)
            for k in train:
                product += float(k @ r) * k / len(train)
            r = v + r - (product + shift * r) / scale
        return r / scale

    queries_Vd = torch.stack([query(v) for v in validation_Vd.double()])
    return pairs(queries_Vd, train_Td, lambda q, g: float(q @ g))


def ekfac(
    validation_Vd: Tensor,
    train_Td: Tensor,
    *,
    factors: tuple[Tensor, Tensor] | None,
    damping: float = 0.1,
) -> Tensor:
    """EK-FAC with the whole d × d curvature: Q diag(Λ + λ) Qᵀ, Q the Kronecker product.

    Args:
        factors: Σ g gᵀ [O, O] and Σ x xᵀ [I, I]; None for the identity basis.
    """
    d = train_Td.shape[1]
    basis_dd = torch.eye(d, dtype=torch.float64)
    if factors is not None:
        output_OO, input_II = (torch.linalg.eigh(factor.double())[1] for factor in factors)
        basis_dd = torch.kron(output_OO, input_II)
    eigenvalue_d = torch.zeros(d, dtype=torch.float64)
    for g in train_Td.double():
        eigenvalue_d += (basis_dd.T @ g) ** 2 / len(train_Td)
    curvature_dd = basis_dd @ torch.diag(eigenvalue_d) @ basis_dd.T
    curvature_dd += float(eigenvalue_d.mean()) * damping * torch.eye(d, dtype=torch.float64)
    return pairs(
        validation_Vd, train_Td, lambda v, g: float(v @ torch.linalg.solve(curvature_dd, g))
    )


def embedding_gradient(
    token_ids: Sequence[int], gradient_SH: Tensor, *, vocabulary: int
) -> tuple[Tensor, list[int]]:
    """The gradient of a word embedding [W, H], and how often every word occurs."""
    total_WH = torch.zeros(vocabulary, gradient_SH.shape[1], dtype=torch.float64)
    count = [0] * vocabulary
    for token, g in zip(token_ids, gradient_SH.double(), strict=True):
        total_WH[token] += g
        count[token] += 1
    return total_WH, count


def strongest_words(gradient_WH: Tensor, count: Sequence[int], k: int) -> Tensor:
    """The gradient with all but the k words of the largest norm per occurrence set to zero."""
    words = [word for word, number in enumerate(count) if number]
    words.sort(key=lambda word: (-float(gradient_WH[word].norm()) / count[word], word))
    result_WH = torch.zeros_like(gradient_WH)
    for word in words[:k]:
        result_WH[word] = gradient_WH[word]
    return result_WH
