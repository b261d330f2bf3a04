"""Gradients of a word embedding: a few rows of the vocabulary per sample.

Shapes: N samples, P pairs of a sample and one of its tokens, H width of the embedding, B batch,
S sequence, U distinct tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NoReturn, Self

import torch
from torch import Tensor

from workers.influence.rows.base import GradientRows
from workers.influence.rows.join import TokenIndex, add_token_products, expand, index_tokens


@dataclass(eq=False)
class SparseRows(GradientRows):
    """One row of the embedding for every distinct token of every sample; the others are zero.

    Attributes:
        num_samples: N; a sample may have no token.
        num_parameters: vocabulary times width.
        sample_P: int64, ascending.
        token_P: int64; no token stands twice in a sample.
        value_PH: float32, the gradient of the token's row, summed over its occurrences.
        count_P: int64, how often the token occurs in the sample.
    """

    num_samples: int
    num_parameters: int
    sample_P: Tensor
    token_P: Tensor
    value_PH: Tensor
    count_P: Tensor

    @cached_property
    def _index(self) -> TokenIndex:
        return index_tokens(self.token_P)

    def _dot(self, other: Self) -> Tensor:
        # in float64, so that the order of the sum, which a GPU leaves open, is lost in the rounding
        dot_NN = self.value_PH.new_zeros(len(self), len(other), dtype=torch.float64)
        add_token_products(
            dot_NN,
            left=(self._index, self.sample_P, self.value_PH),
            right=(other._index, other.sample_P, other.value_PH),
        )
        return dot_NN.float()

    def squared_norm(self) -> Tensor:
        return self._sum_by_sample(torch.linalg.vecdot(self.value_PH, self.value_PH))

    def absolute_sum(self) -> Tensor:
        return self._sum_by_sample(torch.linalg.vector_norm(self.value_PH, ord=1, dim=1))

    def entry_sum(self) -> Tensor:
        return self._sum_by_sample(self.value_PH.sum(dim=1))

    def total(self) -> tuple[Tensor, Tensor]:
        """Return the sum of the rows as the tokens in it, int64 [U] ascending, and float64 [U, H].

        All other rows of the vocabulary are zero.
        """
        token_U, place_P = self.token_P.unique(return_inverse=True)
        total_UH = self.value_PH.new_zeros(
            len(token_U), self.value_PH.shape[1], dtype=torch.float64
        )
        return token_U, total_UH.index_add_(0, place_P, self.value_PH.double())

    def dense(self) -> NoReturn:
        raise TypeError("the gradients of a word embedding are never written out.")

    def to(self, device: torch.device | str) -> Self:
        return replace(
            self,
            sample_P=self.sample_P.to(device),
            token_P=self.token_P.to(device),
            value_PH=self.value_PH.to(device),
            count_P=self.count_P.to(device),
        )

    def select(self, index_N: Tensor) -> Self:
        size_N = self.sample_P.bincount(minlength=len(self))
        start_N = size_N.cumsum(0) - size_N
        index_N = index_N.to(start_N.device)
        rows_P = expand(start_N[index_N], size_N[index_N])
        sample_N = torch.arange(len(index_N), device=rows_P.device)
        return replace(
            self._take(rows_P),
            num_samples=len(index_N),
            sample_P=sample_N.repeat_interleave(size_N[index_N]),
        )

    def strongest(self, k: int) -> Self:
        """Keep, of every sample, the k tokens with the largest ‖value‖ / count.

        That is the length of the gradient per occurrence (Yeh et al., NeurIPS 2022, section 5.1);
        of equals the token with the smaller id stays.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k = {k} tokens are below 1.")
        strength_P = torch.linalg.vector_norm(self.value_PH, dim=1) / self.count_P
        # the keys of the order from the last to the first: token, strength, sample
        order_P = self.token_P.argsort(stable=True)
        order_P = order_P[strength_P[order_P].argsort(descending=True, stable=True)]
        order_P = order_P[self.sample_P[order_P].argsort(stable=True)]
        size_N = self.sample_P.bincount(minlength=len(self))
        start_P = (size_N.cumsum(0) - size_N).repeat_interleave(size_N)
        place_P = torch.arange(len(order_P), device=order_P.device) - start_P
        return self._take(order_P[place_P < k].sort().values)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "size": torch.tensor([self.num_samples, self.num_parameters]),
            "sample": self.sample_P.contiguous(),
            "token": self.token_P.contiguous(),
            "value": self.value_PH.contiguous(),
            "count": self.count_P.contiguous(),
        }

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        starts = accumulate((len(part) for part in parts[:-1]), initial=0)
        return cls(
            num_samples=sum(len(part) for part in parts),
            num_parameters=parts[0].num_parameters,
            sample_P=torch.cat(
                [part.sample_P + start for part, start in zip(parts, starts, strict=True)]
            ),
            token_P=torch.cat([part.token_P for part in parts]),
            value_PH=torch.cat([part.value_PH for part in parts]),
            count_P=torch.cat([part.count_P for part in parts]),
        )

    def _take(self, rows_P: Tensor) -> Self:
        return replace(
            self,
            sample_P=self.sample_P[rows_P],
            token_P=self.token_P[rows_P],
            value_PH=self.value_PH[rows_P],
            count_P=self.count_P[rows_P],
        )

    def _sum_by_sample(self, value_P: Tensor) -> Tensor:
        sum_N = value_P.new_zeros(len(self), dtype=torch.float64)
        return sum_N.index_add_(0, self.sample_P, value_P.double()).float()


def sparse_rows(
    input_ids_BS: Tensor, gradient_BSH: Tensor, mask_BS: Tensor, *, vocabulary: int
) -> SparseRows:
    """Sum the gradients of an embedding's output by sample and token.

    Args:
        input_ids_BS: int64 token ids.
        gradient_BSH: gradient of every sample's own loss by the embedding's output.
        mask_BS: nonzero where there is a token; padding gives nothing.
        vocabulary: number of the embedding's rows.
    """
    sample_R, place_R = mask_BS.nonzero(as_tuple=True)
    key_R = sample_R * vocabulary + input_ids_BS[sample_R, place_R]
    key_P, row_R, count_P = key_R.unique(return_inverse=True, return_counts=True)
    # in float64, so that the order of the sum, which a GPU leaves open, is lost in the rounding
    gradient_RH = gradient_BSH[sample_R, place_R].double()
    value_PH = gradient_RH.new_zeros(len(key_P), gradient_RH.shape[1])
    return SparseRows(
        num_samples=len(input_ids_BS),
        num_parameters=vocabulary * gradient_RH.shape[1],
        sample_P=key_P // vocabulary,
        token_P=key_P % vocabulary,
        value_PH=value_PH.index_add_(0, row_R, gradient_RH).float(),
        count_P=count_P,
    )
