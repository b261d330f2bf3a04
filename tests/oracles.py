"""Slow, obvious versions of what the engine computes: loops over samples, sorts and sums.

Shapes: T training samples, V validation samples, M modules, B batch, d entries of a module.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.influence.batching import collate


def engine_name(parameter_name: str) -> str:
    """Translate the name of a PEFT model's parameter into the engine's name of the module."""
    name = parameter_name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for factor in ("lora_A", "lora_B", "lora_magnitude_vector"):
        name = name.replace(f"{factor}.default.weight", factor)
    return name


def sample_loss(model: nn.Module, ids: Sequence[int], target: int | Sequence[int]) -> Tensor:
    """Compute the loss of one unpadded sample.

    The cross-entropy of a class index, or the mean of that of all tokens that are labelled (not
    -100), each predicted from the tokens before it.
    """
    device = next(model.parameters()).device
    logits = model(**collate([ids], pad_id=0, device=device)).logits[0].float()
    if isinstance(target, int):
        return cross_entropy(logits, torch.tensor(target, device=device))
    losses = [
        cross_entropy(logits[place - 1], torch.tensor(token, device=device))
        for place, token in enumerate(target)
        if token >= 0 and place > 0
    ]
    return torch.stack(losses).mean()


def loop_gradients(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    labels: Sequence[int | Sequence[int]],
) -> tuple[dict[str, Tensor], Tensor]:
    """Take parameter gradients of one unpadded sample at a time through the model as it is.

    Args:
        model: a classifier or causal language model, with or without an adapter.
        token_ids: of every sample.
        labels: a class index of every sample, or token labels as long as its token ids.

    Returns:
        Gradients [B, d] by the engine's name for every parameter that requires one, and loss_B.
    """
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {engine_name(name): [] for name in parameters}
    losses = []
    for ids, label in zip(token_ids, labels, strict=True):
        model.zero_grad()
        loss = sample_loss(model, ids, label)
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows[engine_name(name)].append(gradient.flatten().float().clone())
    return {name: torch.stack(row) for name, row in rows.items()}, torch.stack(losses)


def datainf_influence(validation_Vd: Tensor, train_Td: Tensor) -> Tensor:
    """Compute DataInf by its double sum over single samples, float64 [V, T]."""
    validation_Vd, train_Td = validation_Vd.double(), train_Td.double()
    num_train, num_parameters = train_Td.shape
    damping = sum(float(g @ g) for g in train_Td) / num_train / (10 * num_parameters)
    influence_VT = torch.zeros(len(validation_Vd), num_train, dtype=torch.float64)
    for j, v in enumerate(validation_Vd):
        for i, g in enumerate(train_Td):
            total = 0.0
            for other in train_Td:
                total += float(v @ other) * float(other @ g) / (damping + float(other @ other))
            influence_VT[j, i] = (float(v @ g) - total / num_train) / damping
    return influence_VT


def ranks(values: Sequence[float]) -> list[int]:
    """Rank values, 0 = lowest, ties by position."""
    result = [0] * len(values)
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: (values[i], i))):
        result[index] = rank
    return result


def aggregate(influence_MVT: Tensor, *, aggregation: str, vote_fraction: float) -> list[float]:
    """Aggregate every column in turn by mean, rank or vote, in Python's own numbers."""
    columns = influence_MVT.flatten(0, 1).tolist()
    num_train = influence_MVT.shape[-1]
    count = max(1, round(vote_fraction * num_train))
    total = [0.0] * num_train
    for column in columns:
        rank = ranks(column)
        for index in range(num_train):
            total[index] += {
                "mean": column[index],
                "rank": rank[index],
                "vote": -max(count - rank[index], 0),
            }[aggregation]
    return [value / len(columns) for value in total]


def noise_detection_rates(scores: Sequence[float], is_noisy: Sequence[bool]) -> list[float]:
    """Compute the share of all noisy samples among the lowest 1, 2, … T scores."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    num_noisy = sum(is_noisy)
    return [
        sum(is_noisy[index] for index in order[:cut]) / num_noisy
        for cut in range(1, len(scores) + 1)
    ]


def auc_ndr(scores: Sequence[float], is_noisy: Sequence[bool]) -> float:
    """Compute the area under the NDR curve by trapezoids, over n_clean + n_noise / 2."""
    rates = [0.0, *noise_detection_rates(scores, is_noisy)]
    area = sum((rates[cut - 1] + rates[cut]) / 2 for cut in range(1, len(rates)))
    num_noisy = sum(is_noisy)
    return area / (len(scores) - num_noisy + num_noisy / 2)
