"""Workers that share a bucket alone: whatever one writes another reads, and the results stay."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest

from app import shared_files
from app.audits.folders import audit_folder, influence_bytes, remove_influence
from app.audits.models import Audit
from tests.buckets import MotoBucket, moto_bucket
from tests.pipeline.conftest import Models
from tests.pipeline.tiny import reviews
from tests.pipeline.workplace import Workplace, results
from workers.pipeline import runtime

EVERYTHING: dict[str, Any] = {
    "estimators": ["tracin", "ekfac", "datainf", "repsim", "outlier_gradient", "self_influence"],
    "ranking": {"estimator": "auto", "layers": "auto", "aggregation": "auto"},
    "fine_tune": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 16},
    "verify": {"fraction": 0.2, "seeds": [1, 2], "arms": ["filtered", "full"]},
    "flag": "auto",
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[MotoBucket]:
    with moto_bucket() as bucket:
        yield bucket


@pytest.fixture
def apart(workplace: Workplace, bucket: MotoBucket) -> Iterator["Apart"]:
    """Two workers with a data directory each."""
    folder = workplace.settings.data_dir
    settings = workplace.settings.model_validate(workplace.settings.model_dump() | bucket.settings)
    places = [
        replace(
            workplace,
            settings=settings.model_copy(update={"data_dir": folder.with_name(f"data-{name}")}),
        )
        for name in ("one", "other")
    ]
    yield Apart(places)
    shared_files._buckets.clear()


class Apart:
    """Workers that take turns: no two units in a row are one worker's."""

    def __init__(self, places: list[Workplace]) -> None:
        self.places = places

    def succeed(self, audit_id: str) -> Audit:
        for place in cycle(self.places):
            claim = place.claim(audit_id)
            if claim is None:
                break
            runtime._loaded.clear()  # each is a process of its own
            place.execute(claim)
        audit = self.places[0].audit(audit_id)
        assert audit.state == "succeeded", (audit.error_code, audit.error_message)
        return audit


def test_workers_apart_find_what_one_worker_finds(
    workplace: Workplace, apart: Apart, bucket: MotoBucket, models: Models
) -> None:
    """Every stage and every kind of file; and then nothing is left of an audit that is removed."""
    test = workplace.table("test", reviews(12, seed=2))

    def submit() -> str:
        data = workplace.reviews()
        return workplace.submit(models.encoder, **data, test=test, **EVERYTHING)

    expected = workplace.succeed(submit())
    audit = apart.succeed(submit())
    assert results(audit) == results(expected)
    assert audit.summary["verification"]["arms"] == expected.summary["verification"]["arms"]
    there = bucket.names(f"audits/{audit.id}")
    assert not [name for name in there if "/scratch/" in name or name.endswith(".partial")]
    assert sorted(path.name for path in apart.places[0].settings.data_dir.iterdir()) == [
        *("audits", "cache")
    ]
    folder = audit_folder(apart.places[0].settings.data_dir, audit.id)
    assert influence_bytes(folder) == audit.influence_bytes
    assert remove_influence(folder) == 0
    kept = bucket.names(f"audits/{audit.id}")
    assert any("/results/" in name for name in kept)
    assert not [name for name in kept if "/influence/" in name]
    assert shared_files.remove_folder(folder)
    assert bucket.names(f"audits/{audit.id}") == []
