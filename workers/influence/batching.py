"""Cut samples into batches by length, and pad a batch.

Shapes: T samples, B batch, S sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.influence.objectives import IGNORED


def token_budget_batches(length_T: Tensor, *, max_tokens: int, max_samples: int) -> list[Tensor]:
    """Cut samples into batches of similar length, longest first.

    The longest come first, so that a batch that does not fit into memory shows at once.

    Args:
        length_T: int, the number of tokens of every sample.
        max_tokens: most tokens of a batch, padding included; a longer sample is a batch of its own.
        max_samples: most samples of a batch.

    Returns:
        For every batch the int64 positions of its samples; equal lengths stay in their order.

    Raises:
        ValueError: a limit below 1.
    """
    if max_tokens < 1 or max_samples < 1:
        raise ValueError(f"limits below 1: {max_tokens} tokens, {max_samples} samples.")
    order_T = length_T.argsort(descending=True, stable=True).cpu()
    lengths = length_T.cpu()[order_T].tolist()
    batches = []
    start = 0
    while start < len(lengths):
        size = max(1, min(max_samples, max_tokens // max(1, lengths[start])))
        batches.append(order_T[start : start + size])
        start += size
    return batches


def collate(
    token_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device | str,
    token_type_ids: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Pad samples on the right to the longest of them.

    Args:
        token_ids: token ids of every sample.
        pad_id: the token to pad with.
        device: where the tensors go.
        token_type_ids: segment ids of every sample, for models that tell text pairs apart so;
            padded with 0.

    Returns:
        int64 [B, S] tensors `input_ids`, `attention_mask` (1 = token, 0 = padding) and, where
        given, `token_type_ids`.
    """
    columns = {
        "input_ids": _pad(token_ids, value=pad_id),
        "attention_mask": _pad([[1] * len(row) for row in token_ids], value=0),
    }
    if token_type_ids is not None:
        columns["token_type_ids"] = _pad(token_type_ids, value=0)
    return {name: column_BS.to(device) for name, column_BS in columns.items()}


def completion_labels(
    token_ids: Sequence[Sequence[int]],
    completion_starts: Sequence[int],
    *,
    device: torch.device | str,
) -> Tensor:
    """Return what a causal language model should write, aligned with `collate`'s input_ids.

    Args:
        token_ids: token ids of every sample, prompt and completion.
        completion_starts: the position of each sample's first token of the completion.
        device: where the labels go.

    Returns:
        label_BS: int64, the token itself in the completion and IGNORED in the prompt and in
        the padding. Not shifted: position s is predicted from the positions before it.
    """
    rows = [
        [IGNORED] * start + list(row[start:])
        for row, start in zip(token_ids, completion_starts, strict=True)
    ]
    return _pad(rows, value=IGNORED).to(device)


def _pad(rows: Sequence[Sequence[int]], *, value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
