"""Whole audits that leave everything open: what they rank, flag and say, and of which sets.

Shapes: T training samples, P probes.
"""

import itertools
import statistics
from typing import Any

import pytest
import torch

from app.audits.automatic import computed_estimators
from app.audits.models import Audit
from app.catalogue import ESTIMATORS
from tests.pipeline import loops, tiny
from tests.pipeline.conftest import Models
from tests.pipeline.test_probes_in_audits import AUTO, CONSENSUS, drawn
from tests.pipeline.workplace import Workplace
from workers.pipeline import choosing

FINE_TUNE = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 8}
ENOUGH = FINE_TUNE | {"epochs": 10, "rank": 8, "target_modules": ["all-linear"]}
LITTLE = "finds the planted probes better than chance"


def rows_of(workplace: Workplace, audit: Audit) -> list[Any]:
    """Return the ranking, whose numbers are checked for what every ranking must have."""
    rows = workplace.ranked_rows(audit.id)
    assert [row.rank for row in rows] == list(range(audit.num_train or 0))
    assert sorted(row.sample_index for row in rows) == list(range(audit.num_train or 0))
    assert all(one.score <= other.score for one, other in itertools.pairwise(rows))
    assert sum(row.flagged for row in rows) == audit.summary["num_flagged"]
    noise = audit.summary["noise"]
    probabilities: list[Any] = [row.noise_probability for row in rows]
    if noise is None:
        assert probabilities == [None] * len(rows)
        return rows
    assert 0 <= noise["low"] <= noise["share"] <= noise["high"] <= 1
    assert all(0 <= probability <= 1 for probability in probabilities)
    assert probabilities == sorted(probabilities, reverse=True)
    if audit.summary["labels"]:
        assert {row.suggested_label for row in rows} <= set(audit.summary["labels"])
        suggested: list[Any] = [row.suggested_probability for row in rows]
        assert all(0 <= probability <= 1 for probability in suggested)
    return rows


def flag_auto(audit: Audit) -> int:
    noise = audit.summary["noise"]
    return round(noise["share"] * audit.num_train) if noise else 0


@pytest.mark.parametrize("ranking", [AUTO, CONSENSUS], ids=["auto", "consensus"])
def test_a_model_that_has_learned_finds_the_noise(
    workplace: Workplace, models: Models, ranking: dict[str, str]
) -> None:
    """The choice works, and as many are flagged as seem wrong."""
    audit = workplace.succeed(
        workplace.submit(
            models.encoder,
            **loops.sets(workplace, tiny.reviews(160, seed=10), tiny.reviews(60, seed=100)),
            fine_tune=ENOUGH,
            plant_noise={"fraction": 0.2},
            estimators=["grad_dot", "grad_cosine", "datainf"],
            ranking=ranking,
            flag="auto",
        )
    )
    choice = audit.summary["choice"]
    assert choice["works"]
    assert choice["members"][0]["auc_ndr"] > choice["chance"] + 0.15
    assert not any(LITTLE in warning for warning in audit.summary["warnings"])
    assert len(drawn(workplace, audit)[0]) == choice["num_probes"]
    rows = rows_of(workplace, audit)
    noise = audit.summary["noise"]
    assert 0 < noise["share"] < 0.4
    assert noise["low"] <= 0.2
    assert audit.summary["num_flagged"] == round(noise["share"] * 160)
    assert audit.summary["detection"]["auc_ndr"] > 0.8
    told = workplace.training_rows(audit.id)
    is_noisy = [told[row.sample_index].is_noisy for row in rows]
    wrong, right = (
        [row.noise_probability for row, noisy in zip(rows, is_noisy, strict=True) if noisy == what]
        for what in (True, False)
    )
    assert statistics.fmean(wrong) > statistics.fmean(right)


@pytest.mark.parametrize("ranking", [AUTO, CONSENSUS], ids=["auto", "consensus"])
def test_a_model_that_knows_nothing_says_so(
    workplace: Workplace, models: Models, ranking: dict[str, str]
) -> None:
    """Random weights, and labels that no text tells."""
    train, validation = tiny.reviews(70, seed=0), tiny.reviews(20, seed=1)
    draw = torch.Generator().manual_seed(0)
    for table in (train, validation):
        order = torch.randperm(len(table["label"]), generator=draw).tolist()
        table["label"] = [table["label"][place] for place in order]
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            **loops.sets(workplace, train, validation),
            ranking=ranking,
            flag="auto",
        )
    )
    assert not audit.summary["choice"]["works"]
    assert sum(LITTLE in warning for warning in audit.summary["warnings"]) == 1
    rows_of(workplace, audit)
    assert audit.summary["num_flagged"] == flag_auto(audit)


@pytest.mark.parametrize("ranking", [AUTO, CONSENSUS], ids=["auto", "consensus"])
def test_a_language_model(workplace: Workplace, models: Models, ranking: dict[str, str]) -> None:
    """Without classes: nothing is suggested, and no simple model is asked."""
    audit = workplace.succeed(
        workplace.submit(
            models.llama,
            task="causal_lm",
            **loops.sets(workplace, tiny.instructions(90, seed=0), tiny.instructions(20, seed=1)),
            fine_tune=FINE_TUNE,
            plant_noise={"fraction": 0.2},
            ranking=ranking,
            flag="auto",
            probes={"fraction": 0.3},
        )
    )
    rows = rows_of(workplace, audit)
    assert audit.summary["num_flagged"] == flag_auto(audit)
    assert {row.suggested_label for row in rows} == {None}
    assert {row.suggested_probability for row in rows} == {None}
    estimators = {row["estimator"] for row in audit.summary["configurations"]}
    assert "confidence" not in estimators
    assert estimators == set(computed_estimators(audit.request))
    members = [member["estimator"] for member in audit.summary["choice"]["members"]]
    if ranking is AUTO:
        assert len(members) == 1
    else:
        assert sorted(members) == sorted(estimators - {"random", "oracle"})


def test_a_flag_alone_is_measured_without_a_choice(workplace: Workplace, models: Models) -> None:
    """Classes need no probes for it; completions do."""
    fixed = {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"}
    audit = workplace.succeed(
        workplace.submit(models.classifier, **workplace.reviews(), ranking=fixed, flag="auto")
    )
    assert audit.provenance["num_probe_shards"] == 0
    assert audit.summary["choice"] is None
    assert audit.summary["num_flagged"] == flag_auto(audit)
    rows_of(workplace, audit)
    language = workplace.succeed(
        workplace.submit(
            models.llama,
            adapter=models.llama_adapter,
            task="causal_lm",
            **loops.sets(workplace, tiny.instructions(30, seed=0), tiny.instructions(9, seed=1)),
            ranking=fixed,
            flag="auto",
        )
    )
    assert language.provenance["num_probe_shards"] > 0
    assert language.summary["choice"] is None
    assert language.summary["num_flagged"] == flag_auto(language)
    rows_of(workplace, language)


def test_layers_that_no_estimator_has_are_named_with_what_there_is(
    workplace: Workplace, models: Models
) -> None:
    audit = workplace.finish(
        workplace.submit(models.classifier, **workplace.reviews(), ranking=AUTO | {"layers": "07"})
    )
    assert (audit.state, audit.error_code, audit.error_field) == (
        *("failed", "unknown_layers"),
        "ranking.layers",
    )
    assert audit.error_message is not None
    assert "00" in audit.error_message
    assert "CL" in audit.error_message


def test_a_baseline_that_was_chosen_still_shows_what_samples_harm(
    workplace: Workplace, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the influence of the best configuration that has any."""
    monkeypatch.setattr(
        choosing,
        "most_agreed",
        lambda table, margin: next(
            each for each in table if each.configuration.estimator == "confidence"
        ),
    )
    audit = workplace.succeed(
        workplace.submit(
            models.encoder, **workplace.reviews(), fine_tune=FINE_TUNE, ranking=AUTO, flag="auto"
        )
    )
    choice = audit.summary["choice"]
    assert [member["estimator"] for member in choice["members"]] == ["confidence"]
    best = next(
        row for row in choice["measured"] if ESTIMATORS[row["estimator"]].kind == "pairwise"
    )
    twin = workplace.succeed(
        workplace.submit(
            models.encoder,
            **workplace.reviews(),
            fine_tune=FINE_TUNE,
            ranking={
                name: best[name] for name in ("estimator", "layers", "aggregation", "correct_only")
            },
        )
    )
    harmed, expected = (
        {row.sample_index: row.harmed_validation for row in workplace.ranked_rows(each.id)}
        for each in (audit, twin)
    )
    assert harmed == expected
    assert all(harmed.values())
