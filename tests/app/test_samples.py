"""What a finished audit answers of one sample, and of its layers."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from app.audits.models import Audit, RankedSample, TrainingSample
from app.db import transaction
from app.settings import Settings
from tests.factories import make_finished_audit, make_ranking

RESULT_PATHS = ("suspects", "suspects.csv", "suspects.parquet", "samples/0", "layers")


def tell(engine: Engine, **evidence: list[Any]) -> None:
    """Put evidence beside every training sample."""
    with transaction(engine) as session:
        session.execute(update(TrainingSample).values(**evidence))


class TestOneSample:
    def test_it_comes_with_the_evidence(self, client: TestClient, finished: Audit) -> None:
        sample = client.get(f"/v1/audits/{finished.id}/samples/3").json()
        assert (sample["index"], sample["rank"], sample["text"]) == (3, 6, "sample 3")
        assert [standing["layer_group"] for standing in sample["layer_groups"]] == [
            *("all", "00", "CL")
        ]
        assert sample["layer_groups"][0] == {"layer_group": "all", "score": 0.6, "rank": 6}
        assert [(harmed["index"], harmed["influence"]) for harmed in sample["harms_most"]] == [
            (2, -0.5),
            (0, -0.25),
        ]
        assert [helped["text"] for helped in sample["helps_most"]] == ["validation 1"]
        assert "negative is harmful" in sample["score_order"]

    def test_it_names_the_samples_most_like_it_by_every_ranking(
        self, client: TestClient, engine: Engine, settings: Settings, finished: Audit
    ) -> None:
        """Nearest first, whether their labels differ, and how likely the classes are."""
        later = make_ranking(engine, finished, settings=settings)
        tell(
            engine,
            alike_training=[7, 4],
            alike_cosine=[1.0, 0.5],
            opposed_training=[0],
            opposed_cosine=[-0.75],
            class_probabilities=[0.25, 0.75],
            out_of_sample_probabilities=[0.125, 0.875],
        )
        url = f"/v1/audits/{finished.id}"
        sample = client.get(f"{url}/samples/3").json()
        by_later = client.get(f"{url}/rankings/{later.id}/samples/3").json()
        for name in ("most_alike", "most_opposed", "class_probabilities"):
            assert sample[name] == by_later[name]
        alike, other = sample["most_alike"]
        assert alike == {
            "index": 7,
            "text": "sample 7",
            "text_pair": None,
            "given_label": "neg",
            "predicted_label": "neg",
            "similarity": 1.0,
            "has_other_label": False,
        }
        assert (other["index"], other["similarity"], other["has_other_label"]) == (4, 0.5, True)
        (opposed,) = sample["most_opposed"]
        assert (opposed["index"], opposed["similarity"]) == (0, -0.75)
        assert opposed["has_other_label"]
        assert sample["class_probabilities"] == [
            {"label": "neg", "probability": 0.25, "out_of_sample": 0.125},
            {"label": "pos", "probability": 0.75, "out_of_sample": 0.875},
        ]

    def test_of_many_classes_it_shows_some(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        tell(engine, shown_classes=[1], class_probabilities=[0.75])
        sample = client.get(f"/v1/audits/{finished.id}/samples/3").json()
        assert sample["class_probabilities"] == [
            {"label": "pos", "probability": 0.75, "out_of_sample": None}
        ]

    def test_what_nobody_looked_for_is_null_and_what_is_not_there_is_empty(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        url = f"/v1/audits/{finished.id}/samples/3"
        names = ("most_alike", "most_opposed", "class_probabilities")
        assert [client.get(url).json()[name] for name in names] == [None] * 3
        nothing: list[Any] = []
        tell(
            engine,
            alike_training=nothing,
            alike_cosine=nothing,
            opposed_training=nothing,
            opposed_cosine=nothing,
        )
        sample = client.get(url).json()
        assert sample["most_alike"] == sample["most_opposed"] == []

    def test_without_labels_nobody_says_whether_they_differ(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings, has_labels=False)
        tell(
            engine,
            alike_training=[7],
            alike_cosine=[1.0],
            opposed_training=[],
            opposed_cosine=[],
        )
        sample = client.get(f"/v1/audits/{audit.id}/samples/3").json()
        assert sample["most_alike"][0]["has_other_label"] is None
        assert sample["class_probabilities"] is None

    def test_an_estimator_without_pairs_names_no_validation_samples(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        nothing: list[float] = []
        with transaction(engine) as session:
            session.execute(
                update(RankedSample).values(
                    harmed_validation=nothing,
                    harmed_influence=nothing,
                    helped_validation=nothing,
                    helped_influence=nothing,
                )
            )
        sample = client.get(f"/v1/audits/{finished.id}/samples/3").json()
        assert sample["harms_most"] == sample["helps_most"] == []

    def test_a_row_that_is_not_there_is_not_found(
        self, client: TestClient, finished: Audit
    ) -> None:
        response = client.get(f"/v1/audits/{finished.id}/samples/10")
        assert response.status_code == 404
        assert "it has 10, counted from 0" in response.json()["detail"]

    @pytest.mark.parametrize("index", ["-1", "x", "99999999999"])
    def test_an_index_that_is_none_is_refused(
        self, client: TestClient, finished: Audit, index: str
    ) -> None:
        assert client.get(f"/v1/audits/{finished.id}/samples/{index}").status_code == 422


def test_the_layer_table_keeps_the_order_of_the_groups(client: TestClient, finished: Audit) -> None:
    table = client.get(f"/v1/audits/{finished.id}/layers").json()
    assert list(table["layer_groups"]) == ["all", "00", "CL"]
    assert table["data"][0]["detection"]["auc_ndr"] == 1.0
    assert table["module_cancellation"] is None
    assert "lowest score" in table["score_order"]


def test_the_layer_table_tells_the_cancellation_of_every_module(
    client: TestClient, engine: Engine, finished: Audit
) -> None:
    found = {"layer.0.query": {"l1": 3.5, "l2": 2.0}, "head": {"l1": None, "l2": None}}
    with transaction(engine) as session:
        audit = session.merge(finished)
        audit.summary = {**audit.summary, "module_cancellation": found}
    table = client.get(f"/v1/audits/{finished.id}/layers").json()
    assert table["module_cancellation"] == found


def test_an_audit_of_the_first_version_answers_everything(
    client: TestClient, engine: Engine, finished: Audit
) -> None:
    """The summary of 0.1.0 has fewer keys: one order of the groups and no reports."""
    known = (
        *("ranking_id", "num_flagged", "labels", "validation_accuracy", "train_accuracy"),
        *("num_noisy", "warnings", "files", "detection", "group_order", "layer_groups"),
        "configurations",
    )
    with transaction(engine) as session:
        audit = session.merge(finished)
        audit.summary = {name: audit.summary[name] for name in known}
    url = f"/v1/audits/{finished.id}"
    table = client.get(f"{url}/layers").json()
    assert list(table["layer_groups"]) == ["all", "00", "CL"]
    results = client.get(url).json()["results"]
    assert (results["num_flagged"], results["cancellation"]) == (2, None)
    for path in ("suspects", "samples/3", "suspects.csv"):
        assert client.get(f"{url}/{path}").status_code == 200
