"""Orders of scores and columns: whole, or only the lowest of a column.

Shapes: T training samples, C columns, k the lowest of a column.
"""

import numpy as np
import torch
from torch import Tensor

_SORT_ENTRIES = 65_536
_STRIDE = 16
_DEVIATIONS = 3


def order_by_score(score_T: Tensor) -> Tensor:
    """Return the int64 training indices from the most suspect on, ties by training index."""
    return score_T.argsort(stable=True)


def sort_columns(influence_CT: Tensor) -> Tensor:
    """Return order_CT, int64: every column's training indices from the lowest on, ties by index.

    The same as `influence_CT.argsort(dim=1, stable=True)` for finite float32, three times faster on
    a CPU: torch sorts whole numbers by radix, but only in one dimension and from 32,768 entries on.
    So the bits are read as whole numbers of the same order, the column is put into the high bits,
    and as many columns as the cache holds are sorted at once.
    """
    step = _columns_at_once(influence_CT.shape[1])
    blocks = [_sort_block(block_CT) for block_CT in influence_CT.split(step)]
    return torch.cat(blocks) if len(blocks) != 1 else blocks[0]


def rank_columns(influence_CT: Tensor) -> Tensor:
    """Return rank_CT, int32: every sample's rank in every column, 0 = lowest, ties by index."""
    num_train, device = influence_CT.shape[1], influence_CT.device
    rank_1T = torch.arange(num_train, dtype=torch.int32, device=device)[None]
    rank_CT = torch.empty(influence_CT.shape, dtype=torch.int32, device=device)
    step = _columns_at_once(num_train)
    for block_CT, out_CT in zip(influence_CT.split(step), rank_CT.split(step), strict=True):
        out_CT.scatter_(1, _sort_block(block_CT), rank_1T.expand_as(out_CT))
    return rank_CT


def _columns_at_once(num_train: int) -> int:
    return -(-_SORT_ENTRIES // max(1, num_train))


def _sort_block(influence_CT: Tensor) -> Tensor:
    key_CT = _whole_numbers(influence_CT).long()
    column_C1 = torch.arange(len(key_CT), device=key_CT.device)[:, None]
    key_CT += column_C1 << 32
    order_CT = key_CT.flatten().argsort(stable=True).view(key_CT.shape)
    order_CT -= column_C1 * key_CT.shape[1]
    return order_CT


def _whole_numbers(influence_CT: Tensor) -> Tensor:
    """Return int32 numbers in the same order as float32 ones."""
    # adding zero turns -0.0, whose bits sort below those of 0.0, into 0.0
    bits_CT = (influence_CT + 0.0).view(torch.int32)
    bits_CT ^= (bits_CT >> 31) & 0x7FFFFFFF
    return bits_CT


def lowest_of_columns(influence_CT: Tensor, count: int) -> Tensor:
    """Return index_Ck, int64: `sort_columns(influence_CT)[:, :count]` without sorting the rest.

    On a CPU two thirds of the time of a full sort for three tenths of a column, and a third for one
    tenth.
    """
    if influence_CT.device.type != "cpu":
        key_CT = _whole_numbers(influence_CT).long() << 32
        key_CT += torch.arange(key_CT.shape[1], device=key_CT.device)
        return key_CT.topk(count, dim=1, largest=False, sorted=True).values & 0xFFFFFFFF
    number_CT = _whole_numbers(influence_CT).numpy()
    key_Ck = np.empty((len(number_CT), count), dtype=np.int64)
    for number_T, key_k in zip(number_CT, key_Ck, strict=True):
        chosen_N = _at_least_the_lowest(number_T, count)
        # no two keys are equal: the index decides ties
        key_N = number_T[chosen_N].astype(np.int64)
        key_N <<= 32
        key_N |= chosen_N
        key_N.sort()
        key_k[:] = key_N[:count]
    key_Ck &= 0xFFFFFFFF
    return torch.from_numpy(key_Ck)


def lowest_places(value_KT: Tensor, count: int) -> Tensor:
    """Return place_kT, int64: of every sample the places of its lowest values, ties by place.

    The same as `value_KT.argsort(dim=0, stable=True)[:count]` for finite float32, four times
    faster on a CPU: the place is put into the low bits, so that no two keys are equal.
    """
    key_TK = _whole_numbers(value_KT).T.long() << 32
    key_TK += torch.arange(len(value_KT), device=value_KT.device)
    lowest_Tk = key_TK.topk(min(count, len(value_KT)), dim=1, largest=False, sorted=True).values
    return (lowest_Tk & 0xFFFFFFFF).T


def _at_least_the_lowest(
    number_T: np.ndarray[tuple[int], np.dtype[np.int32]], count: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the ascending indices of some numbers: no other is lower, `count` of them or more."""
    # a few more than needed, guessed from every 16th; the rare guess that is too low is mended
    sample_N = number_T[::_STRIDE]
    share = count / len(number_T)
    spread = (len(sample_N) * share * (1 - share)) ** 0.5
    place = min(len(sample_N) - 1, int(len(sample_N) * share + _DEVIATIONS * spread) + 1)
    chosen_N = np.flatnonzero(number_T <= np.partition(sample_N, place)[place])
    if len(chosen_N) < count:
        chosen_N = np.flatnonzero(number_T <= np.partition(number_T, count - 1)[count - 1])
    return chosen_N
