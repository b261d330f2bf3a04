"""Scores end to end against slow, obvious loops: one sample at a time, sorting in Python."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from app.audits.models import Audit
from tests import oracles
from tests.influence import aggregation_oracles
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import VOCABULARY, reviews
from tests.pipeline.workplace import Workplace
from workers.influence.estimators import ESTIMATORS
from workers.pipeline import column_source
from workers.pipeline.artifacts import Artifacts, read_json, read_tensors
from workers.pipeline.layout import ModelLayout
from workers.pipeline.scores import Scorer
from workers.pipeline.training_facts import TrainingFacts
from workers.pipeline.validation_choice import ValidationChoice

# Three classes: with two, the gradient of the head's bias has one direction, every cosine is 1 or
# -1 but for rounding, and so are the ranks.
LABELS = (0, 1, 2)
TRAIN, VALIDATION = reviews(22, seed=0, labels=LABELS), reviews(7, seed=1, labels=LABELS)


def run_audit(workplace: Workplace, models: Models, **request: Any) -> Audit:
    return workplace.succeed(
        workplace.submit(
            models.encoder,
            adapter=models.three_class_adapter,
            train=workplace.table("train", TRAIN),
            validation=workplace.table("validation", VALIDATION),
            **request,
        )
    )


def tokens_of(table: dict[str, Any]) -> list[list[int]]:
    return [[2, *(VOCABULARY.index(word) for word in text.split()), 3] for text in table["text"]]


def adapted_model(models: Models) -> nn.Module:
    """The model as PEFT runs it, with its adapter beside the weights."""
    base = BertForSequenceClassification.from_pretrained(models.encoder, num_labels=len(LABELS))
    model: nn.Module = PeftModel.from_pretrained(
        base, models.three_class_adapter, is_trainable=True
    )
    return model.eval()


def oracle_influence(estimator: str, model: nn.Module) -> dict[str, Tensor]:
    """Return influence_VT by module."""
    train, _ = oracles.loop_gradients(model, tokens_of(TRAIN), TRAIN["label"])
    validation, _ = oracles.loop_gradients(model, tokens_of(VALIDATION), VALIDATION["label"])
    influence = {}
    for name, train_Td in train.items():
        validation_Vd = validation[name]
        dot_VT = validation_Vd @ train_Td.T
        if estimator == "grad_dot":
            influence[name] = dot_VT
        elif estimator == "grad_cosine":
            influence[name] = dot_VT / validation_Vd.norm(dim=1)[:, None] / train_Td.norm(dim=1)
        else:
            influence[name] = oracles.datainf_influence(validation_Vd, train_Td)
    return influence


def predictions(model: nn.Module, table: dict[str, Any]) -> list[int]:
    with torch.no_grad():
        return [
            int(model(input_ids=torch.tensor([ids])).logits.argmax()) for ids in tokens_of(table)
        ]


@pytest.mark.parametrize(
    ("estimator", "aggregation", "correct_only"),
    [
        ("grad_dot", "mean", False),
        ("grad_dot", "vote", True),
        ("grad_cosine", "rank", False),
        ("grad_cosine", "mean", True),
        ("datainf", "vote", False),
        ("datainf", "rank", True),
        ("grad_dot", "median", True),
        ("grad_cosine", "trimmed_mean", False),
        ("grad_cosine", "common_set", False),
        ("datainf", "min", True),
    ],
)
def test_scores_equal_those_of_loops(
    workplace: Workplace, models: Models, estimator: str, aggregation: str, correct_only: bool
) -> None:
    """Every layer group's scores: tokens, adapters, gradients, influence, sorting."""
    audit = run_audit(
        workplace,
        models,
        ranking={
            "estimator": estimator,
            "aggregation": aggregation,
            "correct_only": correct_only,
            "vote_fraction": 0.25,
        },
    )
    model = adapted_model(models)
    influence = oracle_influence(estimator, model)
    predicted = predictions(model, VALIDATION)
    is_correct = [a == b for a, b in zip(predicted, VALIDATION["label"], strict=True)]
    assert any(is_correct)
    assert not all(is_correct)
    rows = sorted(workplace.ranked_rows(audit.id), key=lambda row: row.sample_index)
    for place, group in enumerate(audit.summary["group_order"]):
        influence_MVT = torch.stack(
            [influence[name] for name in audit.summary["layer_groups"][group]]
        )
        if correct_only:
            influence_MVT = influence_MVT[:, is_correct]
        found = torch.tensor([row.group_scores[place] for row in rows], dtype=torch.float64)
        lowest, highest = oracle_bounds(influence_MVT, aggregation=aggregation, vote_fraction=0.25)
        assert bool(((lowest <= found) & (found <= highest)).all())
        # and it explains little: the test would notice an error
        assert float((highest - lowest).mean()) < 0.03 * float(found.max() - found.min())


def oracle_bounds(
    influence_MVT: Tensor, *, aggregation: str, vote_fraction: float
) -> tuple[Tensor, Tensor]:
    """Return the least and the largest score_T that rounding of the influence can explain.

    The last bits of a gradient depend on its batch, and where two influences of a column differ by
    no more than that, either order is right.
    """
    slack = 2e-6 * influence_MVT.abs().amax(dim=2, keepdim=True)
    bounds = []
    for sign in (-1, 1):
        # one sample at a time against all others as they are
        scores = [
            aggregation_oracles.aggregate(
                influence_MVT + sign * slack * (torch.arange(influence_MVT.shape[2]) == sample),
                aggregation,
                vote_fraction=vote_fraction,
            )[sample]
            for sample in range(influence_MVT.shape[2])
        ]
        bounds.append(torch.tensor(scores, dtype=torch.float64) + sign * 1e-6)
    return bounds[0], bounds[1]


@pytest.mark.parametrize("block_bytes", [1, 300, 10**6])
@pytest.mark.parametrize("group", ["all", "CL"])
def test_related_samples_are_those_with_the_lowest_and_highest_mean_influence(
    workplace: Workplace,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    block_bytes: int,
) -> None:
    """Whatever the blocks of validation samples, and ties by index."""
    audit = run_audit(workplace, models)
    artifacts = workplace.artifacts(audit.id)
    layout: Any = read_json(artifacts.modules)
    members = layout["groups"][group]
    facts = TrainingFacts(artifacts, audit.provenance["num_shards"])
    monkeypatch.setattr(column_source, "BLOCK_BYTES", block_bytes)
    everything_V = torch.ones(len(VALIDATION["text"]), dtype=torch.bool)
    scorer = Scorer(
        artifacts,
        facts,
        layout=ModelLayout.read(artifacts.modules),
        validation=ValidationChoice(everything_V, everything_V, everything_V.long()),
    )
    related = scorer.find_related(ESTIMATORS["grad_cosine"], layers=group)
    assert related is not None

    influence_MVT = read_influence(artifacts, facts, "grad_cosine")
    mean_VT = influence_MVT[members].double().mean(dim=0).float()
    for sample, column in enumerate(mean_VT.T.tolist()):
        ascending = sorted(range(len(column)), key=lambda j: (column[j], j))[:5]
        descending = sorted(range(len(column)), key=lambda j: (-column[j], j))[:5]
        assert related.harmed_KT[:, sample].tolist() == ascending
        assert related.helped_KT[:, sample].tolist() == descending
        assert related.harm_KT[:, sample].tolist() == [column[j] for j in ascending]
        assert related.help_KT[:, sample].tolist() == [column[j] for j in descending]


def read_influence(artifacts: Artifacts, facts: TrainingFacts, estimator: str) -> Tensor:
    """Put the shards' influence [M, V, T] together in one piece."""
    shards = [
        read_tensors(artifacts.influence(estimator, shard))["influence"]
        for shard in range(len(facts.shard_index))
    ]
    return torch.cat(shards, dim=2)[:, :, torch.cat(facts.shard_index).argsort()]


def test_published_related_samples_belong_to_the_rankings_layers(
    workplace: Workplace, models: Models
) -> None:
    audit = run_audit(workplace, models, ranking={"layers": "00"})
    artifacts = workplace.artifacts(audit.id)
    layout: Any = read_json(artifacts.modules)
    facts = TrainingFacts(artifacts, audit.provenance["num_shards"])
    influence_MVT = read_influence(artifacts, facts, "grad_cosine")
    mean_VT = influence_MVT[layout["groups"]["00"]].mean(dim=0)
    for row in workplace.ranked_rows(audit.id):
        column = mean_VT[:, row.sample_index]
        assert row.harmed_validation[0] == int(column.argmin())
        assert row.helped_validation[0] == int(column.argmax())
        assert row.harmed_influence[0] == pytest.approx(float(column.min()), rel=1e-5)
        assert row.helped_influence[0] == pytest.approx(float(column.max()), rel=1e-5)
