"""Dot products between the rows of the same token on two sides.

Shapes: P rows of one side, H width, U distinct tokens, C tokens that both sides have, Q products of
two rows, N samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_FEW_PRODUCTS = 12
"""A token with so few products is done row by row: that costs as much as one small matmul."""
_CHUNK_PRODUCTS = 2**20


@dataclass(frozen=True, slots=True)
class TokenIndex:
    """Where the rows of every token stand.

    Attributes:
        token_U: int64, ascending.
        count_U: how many rows the token has.
        start_U: where they begin in `row_P`.
        row_P: the positions of the rows, by token.
    """

    token_U: Tensor
    count_U: Tensor
    start_U: Tensor
    row_P: Tensor


def index_tokens(token_P: Tensor) -> TokenIndex:
    """Index the rows by their token; the rows of one token stay in their order."""
    token_P, row_P = token_P.sort(stable=True)
    token_U, count_U = torch.unique_consecutive(token_P, return_counts=True)
    return TokenIndex(token_U, count_U, count_U.cumsum(0) - count_U, row_P)


def expand(start_C: Tensor, count_C: Tensor) -> Tensor:
    """Return `start`, `start + 1`, … `start + count − 1` for every entry, behind one another."""
    offset_C = start_C - (count_C.cumsum(0) - count_C)
    shift_Q = offset_C.repeat_interleave(count_C)
    return shift_Q + torch.arange(len(shift_Q), device=shift_Q.device)


def add_token_products(
    dot_NN: Tensor,
    *,
    left: tuple[TokenIndex, Tensor, Tensor],
    right: tuple[TokenIndex, Tensor, Tensor],
) -> None:
    """Add v · g to the entry of their samples, for all rows v and g of the same token.

    Memory is bounded by chunks of tokens.

    Args:
        dot_NN: float64 [N left, N right], contiguous; changed in place.
        left: the index of the left rows, their samples [P] and their values [P, H].
        right: the same of the right rows.
    """
    left_index, left_sample_P, left_value_PH = left
    right_index, right_sample_P, right_value_PH = right
    left_C, right_C = _common(left_index.token_U, right_index.token_U)
    num_products_C = left_index.count_U[left_C] * right_index.count_U[right_C]
    # tokens with few products first
    num_products_C, order_C = num_products_C.sort(stable=True)
    left_C, right_C = left_C[order_C], right_C[order_C]
    chunk_C = num_products_C.cumsum(0) // _CHUNK_PRODUCTS
    _, chunk_sizes = torch.unique_consecutive(chunk_C, return_counts=True)
    sizes = chunk_sizes.tolist()
    for left_K, right_K in zip(left_C.split(sizes), right_C.split(sizes), strict=True):
        left_row, right_row, value_Q = _products(
            (left_index, left_value_PH, left_K), (right_index, right_value_PH, right_K)
        )
        target_Q = left_sample_P[left_row] * dot_NN.shape[1] + right_sample_P[right_row]
        dot_NN.view(-1).index_add_(0, target_Q, value_Q.double())


def _common(left_U: Tensor, right_U: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the tokens that both sides have, on either side."""
    if len(right_U) == 0:
        return left_U[:0], right_U[:0]
    position_U = torch.searchsorted(right_U, left_U).clamp(max=len(right_U) - 1)
    left_C = (right_U[position_U] == left_U).nonzero().flatten()
    return left_C, position_U[left_C]


def _products(
    left: tuple[TokenIndex, Tensor, Tensor], right: tuple[TokenIndex, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows on either side and their dot products, [Q] each, token by token.

    A side is its index, its values and the positions of the tokens, which stand in ascending order
    of their numbers of products.
    """
    left_index, left_value_PH, left_C = left
    right_index, right_value_PH, right_C = right
    left_count_C, right_count_C = left_index.count_U[left_C], right_index.count_U[right_C]
    num_products_C = left_count_C * right_count_C

    # every row on the left meets all rows on the right in turn
    left_place_R = expand(left_index.start_U[left_C], left_count_C)
    repeat_R = right_count_C.repeat_interleave(left_count_C)
    left_row_R = left_index.row_P[left_place_R]
    left_row_Q = left_row_R.repeat_interleave(repeat_R)
    right_start_R = right_index.start_U[right_C].repeat_interleave(left_count_C)
    right_row_Q = right_index.row_P[expand(right_start_R, repeat_R)]

    is_few_C = num_products_C <= _FEW_PRODUCTS
    num_few = int(is_few_C.sum())
    num_few_products = int(num_products_C[:num_few].sum())
    value_Q = left_value_PH.new_empty(len(left_row_Q))
    step = max(1, _CHUNK_PRODUCTS // max(1, left_value_PH.shape[1]))
    for start in range(0, num_few_products, step):
        rows = slice(start, min(start + step, num_few_products))
        value_Q[rows] = torch.linalg.vecdot(
            left_value_PH.index_select(0, left_row_Q[rows]),
            right_value_PH.index_select(0, right_row_Q[rows]),
        )

    left_rows = left_row_R[int(left_count_C[:num_few].sum()) :]
    right_rows = right_index.row_P[
        expand(right_index.start_U[right_C[num_few:]], right_count_C[num_few:])
    ]
    left_counts, right_counts = left_count_C[num_few:].tolist(), right_count_C[num_few:].tolist()
    products = [p * q for p, q in zip(left_counts, right_counts, strict=True)]
    for left_AH, right_BH, value in zip(
        left_value_PH.index_select(0, left_rows).split(left_counts),
        right_value_PH.index_select(0, right_rows).split(right_counts),
        value_Q[num_few_products:].split(products),
        strict=True,
    ):
        torch.mm(left_AH, right_BH.T, out=value.view(len(left_AH), len(right_BH)))
    return left_row_Q, right_row_Q, value_Q
