"""Which samples a page or a summary has: filters alone and together, against a plain loop."""

from collections import Counter
from itertools import product
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from app.audits.models import Audit, RankedSample, TrainingSample
from app.db import transaction
from app.settings import Settings
from tests.factories import make_finished_audit, make_ranking, suggest_labels

Row = dict[str, Any]


@pytest.fixture
def finished(client: TestClient, engine: Engine, settings: Settings) -> Audit:
    """Ten samples, some decided; sample i stands at rank 9 - i."""
    audit = make_finished_audit(engine, settings)
    suggest_labels(engine, audit.summary["ranking_id"])
    for action, indices in (("accept", [9, 1]), ("keep", [7]), ("drop", [6, 0])):
        body = {"action": action, "indices": indices}
        assert client.post(f"/v1/audits/{audit.id}/decisions", json=body).status_code == 201
    return audit


def suspects(client: TestClient, audit: Audit, **query: Any) -> list[Row]:
    response = client.get(f"/v1/audits/{audit.id}/suspects", params={"limit": 1000, **query})
    assert response.status_code == 200, response.text
    data: list[Row] = response.json()["data"]
    return data


def action_of(row: Row) -> str | None:
    return row["decision"]["action"] if row["decision"] else None


def matches(row: Row, query: dict[str, Any]) -> bool:
    """Say the filters the plain way."""
    states = query.get("decision", [])
    action = action_of(row)
    return (
        query.get("flagged") in (None, row["flagged"])
        and query.get("label") in (None, row["given_label"])
        and query.get("suggested_label") in (None, row["suggested_label"])
        and row["score"] >= query.get("min_score", -1e9)
        and row["score"] <= query.get("max_score", 1e9)
        and row["noise_probability"] >= query.get("min_noise_probability", 0)
        and row["noise_probability"] <= query.get("max_noise_probability", 1)
        and query.get("search", "").lower() in row["text"].lower()
        and (not states or (action or "none") in states or ("any" in states and action is not None))
    )


CHOICES: dict[str, list[Any]] = {
    "flagged": [None, True, False],
    "label": [None, "pos", "maybe"],
    "suggested_label": [None, "neg"],
    "min_score": [None, 0.25],
    "max_score": [None, 0.5, -1],
    "min_noise_probability": [None, 0.55, 1],
    "max_noise_probability": [None, 0.75],
    "search": [None, "SAMPLE", "e 7"],
    "decision": [None, ["none"], ["any"], ["accept", "drop"], ["keep", "none"], ["none", "any"]],
}


def queries() -> list[dict[str, Any]]:
    """Every filter alone, and every two of them with every choice."""
    chosen: dict[str, dict[str, Any]] = {}
    for one, other in product(CHOICES, CHOICES):
        for pair in product(CHOICES[one], CHOICES[other]):
            query = dict(zip((one, other), pair, strict=True))
            query = {name: value for name, value in query.items() if value is not None}
            chosen[str(sorted(query.items()))] = query
    return list(chosen.values())


def test_filters_alone_and_in_twos_are_what_a_plain_loop_finds(
    client: TestClient, finished: Audit
) -> None:
    everything = suspects(client, finished)
    assert len(everything) == 10
    for query in queries():
        expected = [row["rank"] for row in everything if matches(row, query)]
        assert [row["rank"] for row in suspects(client, finished, **query)] == expected, query


def test_all_filters_together(client: TestClient, finished: Audit) -> None:
    query = {
        "flagged": False,
        "label": "neg",
        "suggested_label": "pos",
        "min_score": 0.1,
        "max_score": 0.4,
        "min_noise_probability": 0.6,
        "max_noise_probability": 0.9,
        "search": "ple 7",
        "decision": ["keep", "none"],
    }
    assert [row["index"] for row in suspects(client, finished, **query)] == [7]


def test_filters_of_another_ranking(
    client: TestClient, engine: Engine, settings: Settings, finished: Audit
) -> None:
    other = make_ranking(engine, finished, settings=settings)
    rows = suspects(client, finished, ranking_id=other.id, decision="any")
    assert [(row["rank"], row["index"]) for row in rows] == [(i, i) for i in (0, 1, 6, 7, 9)]
    url = f"/v1/audits/{finished.id}/rankings/{other.id}/suspects?decision=any"
    assert client.get(url).json()["data"] == rows


def test_pages_of_filters_join_without_gap_or_double(client: TestClient, finished: Audit) -> None:
    url, seen = f"/v1/audits/{finished.id}/suspects?limit=2&decision=none&decision=keep", []
    while url:
        response = client.get(url)
        seen += [row["rank"] for row in response.json()["data"]]
        url = response.links.get("next", {}).get("url", "")
        assert not url or "decision=none&decision=keep" in url
    assert seen == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("odd", ["100%", "a_b", "back\\slash", "o'clock", "schÖn", "%"])
def test_a_search_means_what_it_says(
    client: TestClient, engine: Engine, finished: Audit, odd: str
) -> None:
    """Signs of patterns are signs like any; the second text is searched too."""
    with transaction(engine) as session:
        for index, values in ((3, {"text": f"x {odd.lower()} y"}), (4, {"text_pair": odd})):
            is_meant = TrainingSample.sample_index == index
            session.execute(update(TrainingSample).where(is_meant).values(values))
    assert [row["index"] for row in suspects(client, finished, search=odd)] == [4, 3]


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("min_noise_probability=1.1", "query.min_noise_probability"),
        ("max_noise_probability=nan", "query.max_noise_probability"),
        ("search=", "query.search"),
        ("decision=maybe", "query.decision.0"),
    ],
)
def test_bad_filters_are_refused_by_name(
    client: TestClient, finished: Audit, query: str, place: str
) -> None:
    for rest in ("suspects", "suspects/summary"):
        answer = client.get(f"/v1/audits/{finished.id}/{rest}?{query}")
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == place


class TestSummary:
    def summary(self, client: TestClient, audit: Audit, **query: Any) -> dict[str, Any]:
        response = client.get(f"/v1/audits/{audit.id}/suspects/summary", params=query)
        assert response.status_code == 200, response.text
        summary: dict[str, Any] = response.json()
        return summary

    @pytest.mark.parametrize(
        "query",
        [{}, {"flagged": True}, {"decision": "any"}, {"label": "neg", "search": "sample"}],
        ids=str,
    )
    def test_it_counts_what_the_pages_have(
        self, client: TestClient, finished: Audit, query: dict[str, Any]
    ) -> None:
        rows = suspects(client, finished, **query)
        summary = self.summary(client, finished, **query)
        assert summary["ranking_id"] == finished.summary["ranking_id"]
        assert summary["num_matching"] == len(rows)
        actions = Counter(action_of(row) for row in rows)
        assert summary["num_undecided"] == actions.pop(None, 0)
        assert summary["by_decision"] == {
            action: actions[action] for action in ("accept", "keep", "drop", "edit")
        }
        cells = Counter((row["given_label"], row["suggested_label"]) for row in rows)
        assert {
            (cell["given_label"], cell["suggested_label"]): cell["count"]
            for cell in summary["matrix"]
        } == cells
        histogram = summary["histogram"]
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1 == 51
        assert (histogram["edges"][0], sum(histogram["counts"])) == (0, len(rows))
        assert histogram["edges"][-1] == pytest.approx(0.9)
        assert sum(histogram["flagged_counts"]) == sum(row["flagged"] for row in rows)
        low, high = histogram["edges"][:2]
        first = [row for row in rows if low <= row["score"] < high]
        assert histogram["counts"][0] == len(first)

    def test_scores_that_are_not_finite_have_no_bin(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        with transaction(engine) as session:
            for rank, score in ((0, "-inf"), (9, "nan")):
                is_meant = RankedSample.rank == rank
                session.execute(update(RankedSample).where(is_meant).values(score=float(score)))
        summary = self.summary(client, finished)
        assert (summary["num_matching"], sum(summary["histogram"]["counts"])) == (10, 8)

    def test_scores_that_are_all_the_same_make_no_histogram(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        with transaction(engine) as session:
            session.execute(update(RankedSample).values(score=0.5))
        assert self.summary(client, finished)["histogram"]["edges"] == []

    def test_a_language_model_has_no_matrix(
        self, client: TestClient, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings, has_labels=False)
        summary = self.summary(client, audit)
        assert (summary["num_matching"], summary["matrix"]) == (10, [])
