"""Effort fast: exact influence of the samples with high losses, the others behind them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.audits.models import Audit
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.loops import read_influence
from tests.pipeline.workplace import Workplace, results
from workers.pipeline import screening
from workers.pipeline.training_facts import TrainingFacts

TRAIN = tiny.reviews(90, seed=0, labels=(0, 1))
VALIDATION = tiny.reviews(12, seed=1, labels=(0, 1))
EPOCHS: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 16}


@pytest.fixture
def run(workplace: Workplace, models: Models) -> Callable[..., Audit]:
    def run(
        estimator: str, *, table: dict[str, Any] = TRAIN, name: str = "train", **request: Any
    ) -> Audit:
        settings = request.pop("settings", {})
        place = workplace.with_settings(**settings)
        request = {"aggregation": "rank", "layers": "all", "effort": "fast"} | request
        ranking = {each: request.pop(each) for each in ("layers", "aggregation")}
        if estimator == "tracin":
            request["fine_tune"] = EPOCHS
        adapter = None if estimator == "tracin" else models.adapter
        return place.succeed(
            place.submit(
                models.encoder,
                adapter=adapter,
                train=workplace.table(name, table),
                validation=workplace.table("validation", VALIDATION),
                estimators=[estimator] if estimator not in {"auto", "consensus"} else "auto",
                ranking={"estimator": estimator, **ranking},
                **request,
            )
        )

    return run


def facts_of(workplace: Workplace, audit: Audit) -> TrainingFacts:
    return TrainingFacts(workplace.artifacts(audit.id), audit.provenance["num_shards"])


@pytest.mark.parametrize(
    "estimator", ["grad_dot", "grad_cosine", "datainf", "gauss_newton", "ekfac", "repsim"]
)
@pytest.mark.parametrize("keeps_gradients", [True, False])
def test_it_is_an_exact_audit_of_the_samples_with_high_losses(
    run: Callable[..., Audit], workplace: Workplace, *, estimator: str, keeps_gradients: bool
) -> None:
    """Those that are compared have the influence that they have in an audit of them alone."""
    settings = {} if keeps_gradients else {"max_gradient_cache_bytes": 1}
    fast = run(estimator, settings=settings)
    facts = facts_of(workplace, fast)
    chosen = facts.compared_F.tolist()
    assert fast.summary["num_compared"] == len(chosen)
    assert 0.2 * 90 <= len(chosen) <= 0.4 * 90
    assert facts.loss_T[chosen].min() >= facts.loss_T[~facts.is_compared_T].max() - 0.01
    table = {column: [values[place] for place in chosen] for column, values in TRAIN.items()}
    alone = run(estimator, table=table, name="alone", effort="exact")
    influence, expected = (read_influence(workplace, audit, estimator) for audit in (fast, alone))
    scale = expected.abs().amax()
    torch.testing.assert_close(influence, expected, rtol=1e-3, atol=1e-4 * float(scale))


def test_noise_that_was_planted_with_the_same_seed_does_not_raise_the_threshold(
    run: Callable[..., Audit], workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are looked at in a random order; of the same draw all of them would be of noise."""
    num_train, seed = 400, 3
    monkeypatch.setattr(screening, "_NUM_DRAWN", num_train // 5)
    monkeypatch.setitem(EPOCHS, "epochs", 8)
    audit = run(
        "tracin",
        table=tiny.reviews(num_train, seed=0, labels=(0, 1)),
        plant_noise={"fraction": 0.2, "seed": seed},
        seed=seed,
    )
    loss_T = facts_of(workplace, audit).loss_T
    noisy = [row.sample_index for row in workplace.training_rows(audit.id) if row.is_noisy]
    assert loss_T[noisy].median() > loss_T.quantile(0.8)
    assert 0.2 * num_train < audit.summary["num_compared"] < 0.4 * num_train


@pytest.mark.parametrize("aggregation", ["mean", "rank", "vote", "median", "common_set"])
def test_the_others_stand_behind_them_the_higher_losses_first(
    run: Callable[..., Audit], workplace: Workplace, aggregation: str
) -> None:
    audit = run("grad_cosine", aggregation=aggregation)
    facts = facts_of(workplace, audit)
    rows = workplace.ranked_rows(audit.id)
    places = [row.sample_index for row in rows]
    num_compared = audit.summary["num_compared"]
    assert set(places[:num_compared]) == set(facts.compared_F.tolist())
    behind = facts.loss_T[places[num_compared:]]
    assert torch.equal(behind, behind.sort(descending=True).values)
    scores = [row.score for row in rows]
    assert scores == sorted(scores)
    assert scores[num_compared - 1] < scores[num_compared]


@pytest.mark.parametrize(
    "estimator", ["grad_cosine", "gauss_newton", "ekfac", "tracin", "self_influence"]
)
def test_not_a_bit_depends_on_the_number_of_shards(
    run: Callable[..., Audit], workplace: Workplace, estimator: str
) -> None:
    whole, cut = (
        run(estimator, settings={"samples_per_shard": size, "tokens_per_batch": 128})
        for size in (1000, 17)
    )
    assert cut.provenance["num_shards"] > whole.provenance["num_shards"]
    assert results(whole) == results(cut)
    assert whole.summary["num_compared"] == cut.summary["num_compared"] < 90


@pytest.mark.parametrize(
    "estimator", ["grad_cosine", "datainf", "gauss_newton", "ekfac", "tracin", "self_influence"]
)
def test_a_shard_may_have_nobody_to_compare(
    run: Callable[..., Audit], workplace: Workplace, estimator: str
) -> None:
    table = tiny.reviews(12, seed=0, labels=(0, 1))
    whole, cut = (
        run(estimator, table=table, settings={"samples_per_shard": size, "tokens_per_batch": 1})
        for size in (1000, 1)
    )
    assert cut.provenance["num_shards"] == 12 > cut.summary["num_compared"]
    assert results(whole) == results(cut)


def test_samples_that_are_all_the_same_are_all_compared(run: Callable[..., Audit]) -> None:
    same = {name: values[:1] * 30 for name, values in TRAIN.items()}
    assert run("grad_cosine", table=same).summary["num_compared"] == 30


def test_winnow_chooses_and_explains_as_ever(
    run: Callable[..., Audit], workplace: Workplace
) -> None:
    """With planted probes, of which those with low losses are not compared either."""
    audit = run(
        "consensus",
        layers="auto",
        aggregation="auto",
        probes={"fraction": 0.5, "seed": 1},
        flag="auto",
    )
    choice = audit.summary["choice"]
    assert choice["num_probes"] == 45
    assert choice["num_samples"] == 90
    probes = TrainingFacts(
        workplace.artifacts(audit.id).probes, audit.provenance["num_probe_shards"]
    )
    assert 0 < len(probes.compared_F) <= 45
    assert audit.summary["num_compared"] < 90


def test_an_exact_audit_compares_all(run: Callable[..., Audit]) -> None:
    audit = run("grad_dot", effort="exact")
    assert audit.summary["num_compared"] == 90
    assert audit.provenance["least_loss"] is None


def test_language_models_are_screened_by_the_loss_of_the_completion(
    workplace: Workplace, models: Models
) -> None:
    audit = workplace.succeed(
        workplace.submit(
            models.llama,
            adapter=models.llama_adapter,
            task="causal_lm",
            train=workplace.table("train", tiny.instructions(40, seed=0)),
            validation=workplace.table("validation", tiny.instructions(8, seed=1)),
            estimators=["grad_cosine"],
            effort="fast",
        )
    )
    facts = facts_of(workplace, audit)
    assert 0.2 * 40 <= len(facts.compared_F) <= 0.4 * 40
    compared, others = (facts.loss_T[kept] for kept in (facts.is_compared_T, ~facts.is_compared_T))
    assert compared.min() >= others.max() - 0.05
