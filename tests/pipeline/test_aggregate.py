"""What the last stage says of an audit beside its scores."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pipeline.score_files import LAYOUT
from workers.pipeline.aggregate import measure_accuracy
from workers.pipeline.artifacts import Artifacts, read_tensors, write_tensors
from workers.pipeline.cancelling import describe_cancellation
from workers.pipeline.findings import choose_validation
from workers.pipeline.layout import ModelLayout
from workers.pipeline.ranking import name_groups
from workers.pipeline.training_facts import TrainingFacts


@dataclass
class Samples:
    """As much of a sample set as counts here."""

    label_T: Tensor
    has_completions: bool = False
    facts: dict[str, Tensor] = field(default_factory=dict)


class TestWhichValidationSamplesCount:
    def choose(self, samples: Any, facts: dict[str, Tensor]) -> Any:
        return choose_validation(samples, facts)

    def test_those_that_are_predicted_correctly(self) -> None:
        samples = Samples(torch.tensor([0, 1, 1, 0]))
        facts = {
            "predicted": torch.tensor([0, 1, 0, 0], dtype=torch.int32),
            "is_finite": torch.tensor([True, True, True, False]),
        }
        chosen = self.choose(samples, facts)
        assert chosen.is_correct_V.tolist() == [True, True, False, True]
        assert chosen.is_finite_V.tolist() == [True, True, True, False]
        assert measure_accuracy(samples, facts) == pytest.approx(2 / 3)  # type: ignore[arg-type]  # a stand-in

    @pytest.mark.parametrize(
        ("losses", "broken", "kept"),
        [
            ([3.0, 1.0, 2.0, 4.0], [], [1, 2]),
            ([3.0, 1.0, 2.0, 4.0, 2.5], [], [1, 2, 4]),
            ([1.0, 1.0, 1.0, 1.0], [], [0, 1]),
            ([3.0, 0.0, 2.0, 4.0], [1], [0, 2]),
            ([5.0], [], [0]),
        ],
    )
    def test_of_a_language_model_the_half_with_the_lower_loss(
        self, losses: list[float], broken: list[int], kept: list[int]
    ) -> None:
        """Of those that are finite, ties by index."""
        is_finite_V = torch.ones(len(losses), dtype=torch.bool)
        is_finite_V[broken] = False
        samples = Samples(torch.full((len(losses),), -1), has_completions=True)
        facts = {
            "loss": torch.tensor(losses),
            "is_finite": is_finite_V,
            "predicted_probability": torch.linspace(0, 1, len(losses)),
        }
        chosen = self.choose(samples, facts)
        assert (chosen.is_correct_V & is_finite_V).nonzero().flatten().tolist() == kept
        expected = float(facts["predicted_probability"][is_finite_V].mean())
        assert measure_accuracy(samples, facts) == pytest.approx(expected)  # type: ignore[arg-type]  # a stand-in

    def test_without_a_validation_set_none(self) -> None:
        chosen = self.choose(None, {})
        assert [len(chosen.is_finite_V), len(chosen.is_correct_V), len(chosen.class_V)] == [0] * 3


def test_groups_are_named_in_the_order_of_the_model() -> None:
    """Also those that the ranking's estimator does not have, and its own expression last."""
    configurations = [{"layer_group": name} for name in ("WE", "01-02", "all", "CL", "00")]
    named = name_groups(ModelLayout.of(LAYOUT), configurations)
    assert named["layer_group_order"] == ["all", "WE", "00", "CL", "01-02"]
    assert named["layer_groups"]["01-02"] == ["query.1"]
    assert named["layer_groups"]["WE"] == ["words"]


def test_cancellation_is_that_of_all_shards_together(tmp_path: Path) -> None:
    """Per group, block, module and the ranking's layers; word embeddings token by token."""
    draw = torch.Generator().manual_seed(0)
    vocabulary, num_train, shards = 6, 9, [torch.arange(4), torch.arange(4, 9)]
    rows = [torch.randn(num_train, 3, generator=draw) for _ in range(5)]
    words = torch.randn(num_train, vocabulary, 2, generator=draw)
    words *= torch.rand(num_train, vocabulary, 1, generator=draw) < 0.5
    artifacts = Artifacts(tmp_path, "aud_1")
    for shard, index in enumerate(shards):
        dense = [row[index] for row in [*rows, words.flatten(1)]]
        tokens = words[index].abs().sum(dim=(0, 2)).nonzero().flatten()
        write_tensors(
            artifacts.facts(shard),
            {
                "index": index,
                **{name: torch.zeros(len(index)) for name in ("loss", "predicted")},
                "predicted_probability": torch.zeros(len(index)),
                "given_probability": torch.zeros(len(index)),
                "is_finite": torch.ones(len(index), dtype=torch.bool),
                "squared_norm": torch.stack([row.square().sum(dim=1) for row in dense]),
                "absolute_sum": torch.stack([row.abs().sum().double() for row in dense]),
                **{f"total/{m:05d}": row[index].double().sum(dim=0) for m, row in enumerate(rows)},
                "total/00005": words[index].double().sum(dim=0)[tokens],
                "total_tokens/00005": tokens,
            },
        )
    found = describe_cancellation(
        TrainingFacts(artifacts, 2), ModelLayout.of(LAYOUT), expressions=["01-03,WE", "all"]
    )
    everything = [row.double() for row in [*rows, words.flatten(1)]]
    expected = {**LAYOUT["groups"], "01-03,WE": [2, 3, 5]}
    assert list(found["cancellation"]) == ["all", "WE", "00", "01", "03", "CL", "01-03,WE"]
    assert list(found["module_cancellation"]) == LAYOUT["modules"]
    singles = {name: [module] for module, name in enumerate(LAYOUT["modules"])}
    for table, groups in (("cancellation", expected), ("module_cancellation", singles)):
        for name, members in groups.items():
            together = torch.cat([everything[module] for module in members], dim=1)
            total = together.sum(dim=0)
            assert found[table][name] == {
                "l1": pytest.approx(float(together.abs().sum() / total.abs().sum()), rel=1e-5),
                "l2": pytest.approx(float(together.norm(dim=1).sum() / total.norm()), rel=1e-5),
            }
    assert read_tensors(artifacts.facts(0))["index"].tolist() == [0, 1, 2, 3]
