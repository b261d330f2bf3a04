"""Gradients of one module in every form, made up, and written out.

Shapes: N samples, S tokens, I/O input and output features, P sample and token pairs, H width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workers.influence.rows import (
    DenseRows,
    FactoredRows,
    GradientRows,
    SparseRows,
    sparse_rows,
)

VOCABULARY, WIDTH = 11, 5
INPUTS, OUTPUTS = 4, 3


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build_dense(num_samples: int, *, seed: int = 0) -> DenseRows:
    return DenseRows(torch.randn(num_samples, 12, generator=generator_of(seed)))


def build_factored(num_samples: int, *, seed: int = 0, num_tokens: int = 7) -> FactoredRows:
    generator = generator_of(seed)
    g_NSO = torch.randn(num_samples, num_tokens, OUTPUTS, generator=generator)
    length_N = torch.randint(0, num_tokens + 1, (num_samples, 1), generator=generator)
    g_NSO[torch.arange(num_tokens) >= length_N] = 0
    # what stands at padding is anything
    x_NSI = torch.randn(num_samples, num_tokens, INPUTS, generator=generator) + 1
    return FactoredRows(x_NSI, g_NSO)


def build_tokens(
    num_samples: int, *, seed: int, vocabulary: int, length: int
) -> tuple[Tensor, ...]:
    generator = generator_of(seed)
    input_ids_BS = torch.randint(vocabulary, (num_samples, length), generator=generator)
    length_B = torch.randint(0, length + 1, (num_samples, 1), generator=generator)
    mask_BS = (torch.arange(length) < length_B).long()
    if seed % 2:  # padding on the left
        mask_BS = mask_BS.flip(1)
    gradient_BSH = torch.randn(num_samples, length, WIDTH, generator=generator)
    return input_ids_BS, gradient_BSH, mask_BS


def build_sparse(
    num_samples: int, *, seed: int = 0, vocabulary: int = VOCABULARY, length: int = 8
) -> SparseRows:
    input_ids_BS, gradient_BSH, mask_BS = build_tokens(
        num_samples, seed=seed, vocabulary=vocabulary, length=length
    )
    return sparse_rows(input_ids_BS, gradient_BSH, mask_BS, vocabulary=VOCABULARY)


def written_out(rows: GradientRows) -> Tensor:
    """The rows as float64 [N, d], also those that `dense` refuses."""
    if not isinstance(rows, SparseRows):
        return rows.dense().double()
    width = rows.value_PH.shape[1]
    dense_NUH = torch.zeros(len(rows), rows.num_parameters // width, width, dtype=torch.float64)
    for sample, token, value_H in zip(
        rows.sample_P.tolist(), rows.token_P.tolist(), rows.value_PH, strict=True
    ):
        dense_NUH[sample, token] = value_H.double()
    return dense_NUH.flatten(1)


Build = Callable[..., GradientRows]
EVERY_FORM = pytest.mark.parametrize("build", [build_dense, build_factored, build_sparse])
