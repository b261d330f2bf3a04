"""The results depend on the request and the data, not on how the work was cut."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.audits.models import Audit
from tests.pipeline.conftest import Models
from tests.pipeline.loops import read_influence
from tests.pipeline.workplace import Workplace, results
from workers.influence.gradients import GradientExtractor, SampleGradients

REQUEST: dict[str, Any] = {
    "estimators": ["grad_dot", "grad_cosine", "datainf"],
    "plant_noise": {"fraction": 0.2},
    "flag": {"fraction": 0.1},
}
RANKINGS = [
    {"estimator": "datainf", "aggregation": "rank"},
    {"estimator": "datainf", "aggregation": "mean"},
]
WITH_CURVATURE = [
    *RANKINGS,
    {"estimator": "gauss_newton", "aggregation": "median"},
    {"estimator": "lissa", "aggregation": "min"},
    {"estimator": "ekfac", "aggregation": "common_set"},
]
ALL_KINDS = [
    *WITH_CURVATURE,
    {"estimator": "tracin", "aggregation": "trimmed_mean"},
    {"estimator": "repsim", "aggregation": "median"},
    {"estimator": "outlier_gradient", "aggregation": "min"},
    {"estimator": "tracin_we", "aggregation": "common_set", "layers": "WE"},
    {"estimator": "grad_covariance", "aggregation": "vote"},
    {"estimator": "self_influence", "aggregation": "trimmed_mean"},
]
EVERY_AGGREGATION = {
    "aggregations": ["mean", "rank", "vote", "trimmed_mean", "median", "min", "common_set"]
}
EPOCHS: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 16}


def names_of(ranking: dict[str, str]) -> str:
    return f"{ranking['estimator']}-{ranking['aggregation']}"


@pytest.fixture
def run(workplace: Workplace, models: Models) -> Callable[..., Audit]:
    """Run the same audit under some settings; one that compares epochs trains first."""
    data = workplace.reviews(num_train=90)

    def run(
        *, ranking: dict[str, str], request: dict[str, Any] | None = None, **settings: Any
    ) -> Audit:
        place = workplace.with_settings(**settings)
        request = REQUEST | (request or {})
        model = models.classifier
        if ranking["estimator"] == "tracin":
            model, request = models.encoder, request | {"fine_tune": EPOCHS}
        return place.succeed(place.submit(model, **data, **request, ranking=ranking))

    return run


def assert_same(workplace: Workplace, one: Audit, other: Audit) -> None:
    """Not a bit differs: of the influence, of the result files, of what was measured."""
    estimator = one.request["ranking"]["estimator"]
    if estimator != "self_influence":
        num_checkpoints = EPOCHS["epochs"] if estimator == "tracin" else None
        first, second = (
            read_influence(workplace, audit, estimator, num_checkpoints=num_checkpoints)
            for audit in (one, other)
        )
        assert torch.equal(first, second), (first - second).abs().max()
        assert first.any()
    assert results(one) == results(other)
    assert one.summary["configurations"] == other.summary["configurations"]
    assert one.summary["cancellation"] == other.summary["cancellation"]


@pytest.mark.parametrize("ranking", ALL_KINDS, ids=names_of)
def test_files_are_the_same_however_the_training_set_is_cut(
    run: Callable[..., Audit], workplace: Workplace, ranking: dict[str, str]
) -> None:
    asked = {"ranking": ranking, "request": EVERY_AGGREGATION}
    whole = run(**asked, samples_per_shard=1000)
    cut = run(**asked, samples_per_shard=16)
    assert whole.provenance["num_shards"] == 1
    assert cut.provenance["num_shards"] >= 7
    assert_same(workplace, whole, cut)


@pytest.mark.parametrize("ranking", WITH_CURVATURE, ids=names_of)
@pytest.mark.parametrize("cache_bytes", [0, 300_000])
def test_files_are_the_same_whether_gradients_are_kept_or_computed_again(
    run: Callable[..., Audit], workplace: Workplace, ranking: dict[str, str], cache_bytes: int
) -> None:
    """Again for one module after the other, or for as many as there is room for."""
    kept = run(ranking=ranking)
    again = run(ranking=ranking, max_gradient_cache_bytes=cache_bytes)
    assert kept.provenance["keeps_gradients"]
    assert not again.provenance["keeps_gradients"]
    num_modules = again.provenance["num_modules"]
    num_blocks = again.provenance["num_module_blocks"]
    assert num_blocks == num_modules if cache_bytes == 0 else 1 < num_blocks < num_modules
    assert_same(workplace, kept, again)


def test_files_are_the_same_for_all_estimators_at_once(
    run: Callable[..., Audit], workplace: Workplace
) -> None:
    """With all that they ask of one pass, in one shard or many, gradients kept or not."""
    request = EVERY_AGGREGATION | {
        "estimators": [ranking["estimator"] for ranking in ALL_KINDS],
        "fine_tune": EPOCHS,
    }
    asked = {"ranking": {"estimator": "tracin", "aggregation": "vote"}, "request": request}
    whole = run(**asked, samples_per_shard=1000)
    cut = run(**asked, samples_per_shard=16, max_gradient_cache_bytes=0)
    assert_same(workplace, whole, cut)
    for name in ("gauss_newton", "lissa", "ekfac", "repsim", "outlier_gradient", "tracin_we"):
        first, second = (read_influence(workplace, audit, name) for audit in (whole, cut))
        assert torch.equal(first, second), name


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: ranking["aggregation"])
def test_a_short_memory_halves_the_batch_and_changes_nothing_else(
    run: Callable[..., Audit],
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    ranking: dict[str, str],
    cache_bytes: int,
) -> None:
    """Ranks are the same; scores to the rounding that a batch brings."""
    roomy = run(ranking=ranking, max_gradient_cache_bytes=cache_bytes)
    sizes: list[int] = []
    extract = GradientExtractor.extract

    def with_little_memory(
        self: GradientExtractor, inputs: Mapping[str, Tensor], labels_B: Tensor
    ) -> SampleGradients:
        if len(labels_B) > 4:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(labels_B))
        return extract(self, inputs, labels_B)

    monkeypatch.setattr(GradientExtractor, "extract", with_little_memory)
    tight = run(ranking=ranking, max_gradient_cache_bytes=cache_bytes)
    assert max(sizes) <= 4
    expected, found = (workplace.ranked_rows(audit.id) for audit in (roomy, tight))
    assert [row.sample_index for row in found] == [row.sample_index for row in expected]
    torch.testing.assert_close(
        torch.tensor([row.score for row in found]),
        torch.tensor([row.score for row in expected]),
        rtol=1e-5,
        atol=1e-5 * max(abs(row.score) for row in expected),
    )
    assert found[0].sample_index != found[-1].sample_index


def test_a_batch_of_one_that_does_not_fit_fails_with_what_to_change(
    run: Callable[..., Audit],
    workplace: Workplace,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that is short for good ends the audit at once: time would not heal it."""

    def without_memory(self: GradientExtractor, inputs: object, labels_B: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(GradientExtractor, "extract", without_memory)
    audit = workplace.finish(workplace.submit(models.classifier, **workplace.reviews()))
    assert (audit.state, audit.error_code) == ("failed", "out_of_memory")
    assert audit.error_message is not None
    assert "max_tokens" in audit.error_message
    assert max(unit.attempts for unit in workplace.units(audit.id)) == 1


def test_the_same_audit_twice_gives_the_same_files(run: Callable[..., Audit]) -> None:
    ranking = {"estimator": "grad_cosine"}
    assert results(run(ranking=ranking)) == results(run(ranking=ranking))


def test_the_seed_decides_the_random_baseline(workplace: Workplace, models: Models) -> None:
    data = workplace.reviews(num_train=20)

    def order(seed: int) -> list[int]:
        audit = workplace.succeed(
            workplace.submit(models.classifier, **data, ranking={"estimator": "random"}, seed=seed)
        )
        return [row.sample_index for row in workplace.ranked_rows(audit.id)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_files_of_an_audit_lie_in_its_own_folder(
    run: Callable[..., Audit], workplace: Workplace
) -> None:
    """Nothing is left elsewhere, and no partial file anywhere."""
    audit = run(ranking={"estimator": "grad_dot"})
    data_dir: Path = workplace.settings.data_dir
    names = {path.relative_to(data_dir).parts[0] for path in data_dir.rglob("*") if path.is_file()}
    assert names == {"audits", "cache"}
    assert not [path for path in data_dir.rglob("*") if path.name.endswith(".partial")]
    assert {path.name for path in (data_dir / "audits").iterdir()} == {audit.id}
