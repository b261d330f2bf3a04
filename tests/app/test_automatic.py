"""What `auto` computes and plants, and what cannot be left to it."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.audits.automatic import computed_estimators, needs_features, needs_probes, needs_split
from app.audits.models import Audit
from app.audits.schemas import AuditRequest
from app.db import transaction
from app.settings import Settings
from app.work.models import Stage
from app.work.stages import stages_of
from tests.factories import make_finished_audit, request_body

FIXED = {"estimator": "grad_dot", "layers": "all", "aggregation": "mean"}
BASELINE = {"estimator": "loss"}
LENGTHS = {"estimator": "self_influence", "layers": "all", "aggregation": "mean"}
FLAG = {"count": 3}
LANGUAGE = {"task": "causal_lm"}
FULL = {"fine_tune": None}
ADAPTER = {
    "fine_tune": None,
    "model": {"reference": "hf://org/model@main", "adapter": "hf://org/adapter@main"},
}
NOISY = {"train": {"reference": "hf://datasets/org/texts@main?split=train"}} | {
    "plant_noise": {"fraction": 0.1}
}
TEST = {"reference": "hf://datasets/org/texts@main?split=test"}
CHEAP = {"grad_cosine"}
CURVATURE = {"gauss_newton", "ekfac"}
BASE = {"loss", "random"}


def stored(**changes: Any) -> dict[str, Any]:
    """Return a request as the database has it, with everything left open that is not named."""
    return AuditRequest.model_validate(request_body(**changes)).stored()


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, CHEAP | CURVATURE | {"confidence"}),
        ({"ranking": {"estimator": "consensus"}}, CHEAP | CURVATURE | {"confidence"}),
        (ADAPTER, CHEAP | CURVATURE | {"confidence"}),
        (FULL, CHEAP | {"confidence"}),
        (LANGUAGE, CHEAP | CURVATURE),
        (LANGUAGE | FULL, CHEAP),
        (NOISY, CHEAP | CURVATURE | {"confidence", "oracle"}),
        ({"validation": None}, CHEAP | CURVATURE | {"confidence"}),
        ({"estimators": ["datainf", "repsim"]}, {"datainf", "repsim", "confidence"}),
        ({"ranking": FIXED}, {"grad_dot", "confidence"}),
        ({"ranking": FIXED, "flag": FLAG}, {"grad_dot"}),
        (
            {"ranking": FIXED, "flag": FLAG, "estimators": ["confidence"]},
            {"grad_dot", "confidence"},
        ),
        ({"ranking": FIXED, "flag": FLAG, "estimators": ["repsim"]}, {"grad_dot", "repsim"}),
        ({"ranking": FIXED, "flag": FLAG} | LANGUAGE, {"grad_dot"}),
        ({"ranking": BASELINE, "flag": FLAG}, set()),
        ({"ranking": BASELINE, "flag": FLAG, "validation": None}, set()),
        ({"ranking": LENGTHS, "validation": None}, {"self_influence"}),
        (
            {"ranking": FIXED, "flag": FLAG, "test": TEST}
            | {"verify": {"rankings": [{"estimator": "datainf"}]}},
            {"grad_dot", "datainf"},
        ),
    ],
    # sets have no order, and the names of tests must have one
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_what_is_computed(changes: dict[str, Any], computed: set[str]) -> None:
    found = computed_estimators(stored(**changes))
    assert set(found) == computed | BASE
    assert len(found) == len(set(found)), "each once"


@pytest.mark.parametrize(
    ("changes", "probes", "features", "split"),
    [
        ({}, True, True, False),
        ({"validation": None}, True, True, True),
        (LANGUAGE, True, False, False),
        (LANGUAGE | {"validation": None}, True, False, True),
        ({"ranking": FIXED}, False, True, False),
        ({"ranking": FIXED, "validation": None}, False, True, True),
        ({"ranking": FIXED, "flag": FLAG}, False, False, False),
        ({"ranking": FIXED, "flag": FLAG, "validation": None}, False, False, True),
        # for a language model the flag alone needs probes
        ({"ranking": FIXED} | LANGUAGE, True, False, False),
        ({"ranking": FIXED, "flag": FLAG} | LANGUAGE, False, False, False),
        # what is left open of an estimator with layers is chosen by probes
        ({"ranking": FIXED | {"layers": "auto"}, "flag": FLAG}, True, True, False),
        ({"ranking": FIXED | {"aggregation": "auto"}, "flag": FLAG}, True, True, False),
        ({"ranking": {"estimator": "consensus"}, "flag": FLAG}, True, True, False),
        # a baseline has none
        ({"ranking": BASELINE, "flag": FLAG}, False, False, False),
        ({"ranking": BASELINE, "flag": FLAG, "validation": None}, False, False, False),
        ({"ranking": BASELINE}, False, True, False),
        ({"ranking": {"estimator": "confidence"}, "flag": FLAG}, False, True, False),
        (
            {"ranking": {"estimator": "confidence"}, "flag": FLAG, "validation": None},
            *(False, True, True),
        ),
        # which alone is no reason to take samples from the training set
        ({"ranking": BASELINE, "validation": None}, False, False, False),
        ({"ranking": LENGTHS, "validation": None}, False, False, False),
        ({"ranking": LENGTHS, "estimators": ["repsim"], "validation": None}, False, True, True),
    ],
    ids=str,
)
def test_what_is_needed(
    changes: dict[str, Any], *, probes: bool, features: bool, split: bool
) -> None:
    request = stored(**changes)
    assert needs_probes(request) == probes
    assert needs_features(request) == features
    assert needs_split(request) == split
    assert (Stage.PROBES in stages_of(request)) == probes


@pytest.mark.parametrize(
    ("changes", "pointer", "sentence"),
    [
        *(
            (
                {"ranking": {"estimator": "consensus", name: value}},
                f"#/ranking/{name}",
                f"chooses its members itself; leave out {name}",
            )
            for name, value in (("layers", "CL"), ("aggregation", "rank"))
        ),
        (
            {"ranking": {"estimator": "tracin", "aggregation": "rank"}},
            "#/ranking/layers",
            "cannot choose for tracin; set layers, such as all",
        ),
        (
            {"ranking": {"estimator": "tracin", "layers": "all"}},
            "#/ranking/aggregation",
            "cannot choose for tracin; set aggregation, such as rank",
        ),
        *(
            ({"estimators": [], "ranking": ranking}, "#/estimators", "nothing to choose among")
            for ranking in ({}, {"estimator": "consensus"}, {"layers": "CL"})
        ),
        *(
            (
                {"ranking": {"aggregation": name, **ranking}},
                "#/ranking/aggregation",
                f"{name} cannot rank the planted probes",
            )
            for name in ("trimmed_mean", "median", "min", "common_set")
            for ranking in ({}, {"estimator": "grad_dot"}, {"layers": "CL"})
        ),
        ({"ranking": {"estimator": "best"}}, "#/ranking/estimator", "'consensus'"),
        ({"ranking": {"aggregation": "consensus"}}, "#/ranking/aggregation", "'auto'"),
        ({"ranking": {"layers": "auto,CL"}}, "#/ranking/layers", "pattern"),
        ({"ranking": {"layers": "02-01"}}, "#/ranking/layers", "write 01-02"),
        ({"ranking": {"layers": "WE"}}, "#/ranking/layers", "set model.word_embeddings to true"),
        ({"probes": {"fraction": 0}}, "#/probes/fraction", "greater than 0"),
        ({"probes": {"fraction": 0.6}}, "#/probes/fraction", "less than or equal to 0.5"),
        ({"probes": {"count": 3}}, "#/probes/count", "not permitted"),
        ({"flag": "most"}, "#/flag", "'auto'"),
        (
            LANGUAGE | {"ranking": {"estimator": "confidence"}},
            "#/ranking/estimator",
            "confidence needs classes",
        ),
        (
            {"test": TEST, "verify": {"rankings": [{"estimator": "auto"}]}},
            "#/verify/rankings/0/estimator",
            "Input should be",
        ),
        (
            {"test": TEST, "verify": {"rankings": [{"layers": "auto"}]}},
            "#/verify/rankings/0/layers",
            "pattern",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_left_open_is_refused_by_name(
    client: TestClient, changes: dict[str, Any], pointer: str, sentence: str
) -> None:
    body = request_body(**{"fine_tune": {"epochs": 3}, **changes})
    response = client.post("/v1/audits", json=body)
    assert response.status_code == 422, response.text
    errors = {error["pointer"]: error["detail"] for error in response.json()["errors"]}
    found = {at: text for at, text in errors.items() if at.startswith(pointer)}
    assert found, errors
    assert any(sentence in text for text in found.values()), errors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ranking": {"estimator": "consensus"}},
        {"ranking": {"estimator": "auto", "layers": "00-01,CL", "correct_only": True}},
        {"ranking": {"estimator": "datainf", "aggregation": "vote", "vote_fraction": 0.1}},
        {"ranking": {"estimator": "loss", "aggregation": "median"}},
        {"ranking": {"estimator": "grad_dot", "layers": "CL", "aggregation": "median"}},
        {"estimators": [], "ranking": {"estimator": "grad_dot"}},
        {"validation": None},
        {"validation": None, "task": "causal_lm"},
        {"flag": "auto", "probes": {"fraction": 0.5, "seed": 7}},
    ],
    ids=str,
)
def test_what_may_be_left_open_is_accepted(client: TestClient, changes: dict[str, Any]) -> None:
    response = client.post("/v1/audits", json=request_body(**changes))
    assert response.status_code == 202, response.text


class TestLaterRankings:
    """Of an audit that left nothing open, or something, or everything."""

    @pytest.fixture
    def ask(self, client: TestClient, engine: Engine, settings: Settings) -> Callable[..., Any]:
        """Ask for a ranking of an audit with a request."""
        audit = make_finished_audit(engine, settings)

        def ask(request: dict[str, Any], ranking: dict[str, Any]) -> Any:
            with transaction(engine) as session:
                session.get_one(Audit, audit.id).request = request
            return client.post(f"/v1/audits/{audit.id}/rankings", json=ranking)

        return ask

    @pytest.mark.parametrize(
        ("changes", "ranking", "pointer", "sentence"),
        [
            *(
                (
                    {"ranking": FIXED},
                    ranking,
                    f"#/{name}",
                    f"planted no probes, so nothing can be chosen by them; set {name}",
                )
                for ranking, name in (
                    ({}, "estimator"),
                    ({"estimator": "consensus"}, "estimator"),
                    ({"estimator": "grad_dot"}, "layers"),
                    ({"estimator": "grad_dot", "layers": "CL"}, "aggregation"),
                )
            ),
            ({}, {"estimator": "consensus", "layers": "CL"}, "#/layers", "leave out layers"),
            ({}, {"estimator": "repsim"}, "#/estimator", "did not compute repsim"),
            ({}, {"aggregation": "median"}, "#/aggregation", "cannot rank the planted probes"),
        ],
        ids=str,
    )
    def test_what_cannot_be_chosen_any_more_is_refused(
        self,
        ask: Callable[..., Any],
        *,
        changes: dict[str, Any],
        ranking: dict[str, Any],
        pointer: str,
        sentence: str,
    ) -> None:
        response = ask(stored(**changes), ranking)
        assert response.status_code == 422, response.text
        (error,) = response.json()["errors"]
        assert error["pointer"] == pointer
        assert sentence in error["detail"]

    @pytest.mark.parametrize(
        ("changes", "ranking"),
        [
            ({}, {}),
            ({}, {"estimator": "consensus", "flag": "auto"}),
            ({}, {"estimator": "grad_cosine", "layers": "CL"}),
            ({}, {"estimator": "self_influence"}),
            ({}, {"estimator": "confidence"}),
            ({"ranking": FIXED | {"layers": "auto"}}, {"estimator": "auto"}),
            ({"ranking": FIXED}, {"estimator": "loss"}),
            ({"ranking": FIXED}, {**FIXED, "flag": "auto"}),
            ({"ranking": FIXED, "flag": "auto"} | LANGUAGE, {"estimator": "grad_dot"}),
        ],
        ids=str,
    )
    def test_what_can_be_is_accepted(
        self,
        ask: Callable[..., Any],
        *,
        changes: dict[str, Any],
        ranking: dict[str, Any],
    ) -> None:
        response = ask(stored(**changes), ranking)
        assert response.status_code == 202, response.text
