"""TracIn over the states of a tiny model, against a loop over pairs at every state."""

import math

import pytest
import torch
from torch import nn

from tests.influence.extraction import by_name, exact_loop, run
from tests.influence.tiny_models import sample_tokens, tiny_adapted
from workers.influence.estimators.tracin import TracIn
from workers.influence.gradients import GradientExtractor


def states() -> list[nn.Module]:
    """A model with an adapter before and after its factors have moved."""
    earlier, later = tiny_adapted("bert"), tiny_adapted("bert")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in later.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return [earlier, later]


@pytest.mark.parametrize("rates", [[1e-3, 5e-4], [5e-4, 1e-3], [0.0, 1e-3]])
def test_influence_is_summed_over_the_states_by_their_learning_rates(rates: list[float]) -> None:
    """Σ_c η_c v^c · g^c, gradients and all; a state of rate 0 adds nothing."""
    train_ids, train_labels = sample_tokens(6, seed=1)
    validation_ids, validation_labels = sample_tokens(4, seed=2)
    weights = TracIn().weights(rates)
    expected: dict[str, list[list[float]]] = {}
    actual: dict[str, torch.Tensor] = {}
    for model, rate, weight in zip(states(), rates, weights, strict=True):
        train = exact_loop(model, train_ids, train_labels)
        validation = exact_loop(model, validation_ids, validation_labels)
        extractor = GradientExtractor(model)
        train_rows = by_name(extractor, run(extractor, train_ids, train_labels))
        validation_rows = by_name(extractor, run(extractor, validation_ids, validation_labels))
        for name, rows in validation_rows.items():
            dot_VT = weight * rows.dot(train_rows[name])
            actual[name] = actual[name] + dot_VT if name in actual else dot_VT
            sums = expected.setdefault(name, [[0.0] * 6 for _ in range(4)])
            for j, v in enumerate(validation[name].double()):
                for i, g in enumerate(train[name].double()):
                    sums[j][i] += rate * float(v.flatten() @ g.flatten())
    assert len(actual) == 14
    for name, influence_VT in actual.items():
        expected_VT = torch.tensor(expected[name])
        limit = 1e-4 * float(expected_VT.abs().max())
        torch.testing.assert_close(influence_VT, expected_VT, rtol=1e-4, atol=limit)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([], "at least 2 checkpoints, not 0"),
        ([1e-3], "at least 2 checkpoints, not 1"),
        ([1e-3, -1e-4], "a learning rate of -0.0001 "),
        ([1e-3, math.nan], "a learning rate of nan"),
        ([1e-3, math.inf], "a learning rate of inf"),
        ([0.0, 0.0], "a checkpoint with a learning rate above 0"),
    ],
)
def test_what_cannot_be_a_weight_is_refused(rates: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TracIn().weights(rates)
