"""The results depend on the request and the data, not on how the work was cut."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.audits.models import Audit
from tests.pipeline.conftest import Models
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


@pytest.fixture
def run(workplace: Workplace, models: Models) -> Callable[..., Audit]:
    """Run the same audit under some settings."""
    data = workplace.reviews(num_train=90)

    def run(*, ranking: dict[str, str], **settings: Any) -> Audit:
        place = workplace.with_settings(**settings)
        return place.succeed(place.submit(models.classifier, **data, **REQUEST, ranking=ranking))

    return run


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: ranking["aggregation"])
def test_files_are_the_same_however_the_training_set_is_cut(
    run: Callable[..., Audit], ranking: dict[str, str]
) -> None:
    whole = run(ranking=ranking, samples_per_shard=1000)
    cut = run(ranking=ranking, samples_per_shard=16)
    assert whole.provenance["num_shards"] == 1
    assert cut.provenance["num_shards"] >= 7
    assert results(cut) == results(whole)
    assert cut.summary["configurations"] == whole.summary["configurations"]


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: ranking["aggregation"])
def test_files_are_the_same_whether_gradients_are_kept_or_computed_again(
    run: Callable[..., Audit], ranking: dict[str, str]
) -> None:
    kept = run(ranking=ranking)
    again = run(ranking=ranking, max_gradient_cache_bytes=0)
    assert kept.provenance["keeps_gradients"]
    assert not again.provenance["keeps_gradients"]
    assert results(again) == results(kept)


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
