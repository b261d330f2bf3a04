"""A later ranking chooses among what its audit computed, whatever the audit's own ranking was."""

from typing import Any

import pytest

from app.audits.models import Audit, Ranking
from app.db import transaction
from tests.factories import make_ranking
from tests.pipeline.conftest import Models
from tests.pipeline.test_automatic_audits import ENOUGH, flag_auto
from tests.pipeline.test_probes_in_audits import AUTO, CONSENSUS
from tests.pipeline.workplace import Workplace, results

FINE_TUNE = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8}


def ask(workplace: Workplace, audit: Audit, **specification: Any) -> Ranking:
    """Ask for a ranking that flags what seems wrong, and work until it has ended well."""
    ranking_id = make_ranking(workplace.engine, audit, **specification).id
    with transaction(workplace.engine) as session:
        session.get_one(Ranking, ranking_id).flag = "auto"
    workplace.finish(audit.id)
    with transaction(workplace.engine) as session:
        ranking = session.get_one(Ranking, ranking_id)
    assert ranking.state == "succeeded", (ranking.error_code, ranking.error_message)
    return ranking


def test_later_rankings_choose_as_an_audit_does(workplace: Workplace, models: Models) -> None:
    data = workplace.reviews(num_train=50)

    def submit(ranking: dict[str, Any]) -> Audit:
        return workplace.succeed(
            workplace.submit(models.classifier, **data, ranking=ranking, flag="auto")
        )

    audit = submit(AUTO)
    rankings: list[dict[str, Any]] = [
        *(CONSENSUS, AUTO | {"layers": "01"}, AUTO | {"aggregation": "vote"})
    ]
    for ranking in rankings:
        later = ask(workplace, audit, **ranking)
        twin = submit(ranking)
        for name in ("choice", "noise", "num_flagged", "detection", "group_order"):
            assert later.summary[name] == twin.summary[name], (ranking, name)
        found = {name: file["sha256"] for name, file in later.summary["files"].items()}
        assert found == results(twin), ranking


@pytest.mark.parametrize("ranking", [AUTO, CONSENSUS], ids=["auto", "consensus"])
def test_an_audit_of_one_estimator_leaves_that_one_to_choose(
    workplace: Workplace, models: Models, ranking: dict[str, str]
) -> None:
    """Though `auto` would have computed others, had the audit asked for it."""
    audit = workplace.succeed(
        workplace.submit(
            models.encoder,
            **workplace.reviews(),
            fine_tune=FINE_TUNE,
            ranking={"estimator": "grad_dot", "layers": "auto", "aggregation": "auto"},
        )
    )
    later = ask(workplace, audit, **ranking)
    members = {member["estimator"] for member in later.summary["choice"]["members"]}
    assert members <= {"grad_dot", "confidence", "loss"}
    assert len(members) == (1 if ranking is AUTO else 3)


def test_an_audit_without_validation_leaves_what_needs_none(
    workplace: Workplace, models: Models
) -> None:
    """No part of the training set stood in for a validation set, and none does later."""
    audit = workplace.succeed(
        workplace.submit(
            models.classifier,
            train=workplace.reviews()["train"],
            ranking={"estimator": "self_influence", "layers": "auto", "aggregation": "auto"},
        )
    )
    assert audit.num_validation == 0
    later = ask(workplace, audit, **AUTO)
    (member,) = later.summary["choice"]["members"]
    assert member["estimator"] in {"self_influence", "loss"}
    assert later.summary["noise"] is None


def test_what_stood_in_for_a_validation_set_judges_every_later_ranking(
    workplace: Workplace, models: Models
) -> None:
    """Of a baseline too, which alone would have needed none."""
    audit = workplace.succeed(
        workplace.submit(
            models.encoder,
            train=workplace.reviews(num_train=100)["train"],
            fine_tune=ENOUGH,
            ranking=AUTO,
            flag="auto",
        )
    )
    assert audit.num_validation == 20
    assert audit.summary["noise"] is not None
    for ranking in ({"estimator": "loss"}, {"estimator": "confidence"}):
        later = ask(workplace, audit, **ranking)
        assert later.summary["noise"] == audit.summary["noise"], ranking
        assert later.summary["num_flagged"] == flag_auto(audit)
