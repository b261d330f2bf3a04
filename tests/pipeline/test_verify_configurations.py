"""Which layers an audit compares, and a verification of every configuration of its table."""

from typing import Any

from app.audits.models import Audit
from tests.pipeline.conftest import Models
from tests.pipeline.verifying import FINE_TUNE, arms_of, plan_of, submit_reviews
from tests.pipeline.workplace import Workplace

GROUPS = ["all", "CL", "00-01"]
ASKED: dict[str, Any] = {
    "estimators": ["grad_dot", "self_influence"],
    "aggregations": ["mean", "vote"],
    "layer_groups": GROUPS,
    "ranking": {
        "estimator": "grad_dot",
        "layers": "all",
        "aggregation": "mean",
        "vote_fraction": 0.4,
        "correct_only": False,
    },
    "flag": {"fraction": 0.2},
    "fine_tune": FINE_TUNE | {"epochs": 1},
}
NAMED: dict[str, Any] = {"estimator": "grad_dot", "layers": "CL", "aggregation": "mean"}


def test_every_configuration_of_the_table_is_an_arm(workplace: Workplace, models: Models) -> None:
    """The same as if each had been named; those that are named stand once."""

    def run(**verify: Any) -> Audit:
        options = {"arms": ["full"], "seeds": [0], **verify}
        return workplace.succeed(submit_reviews(workplace, models, **ASKED, verify=options))

    chosen = {"correct_only": [True], "estimators": ["grad_dot", "loss"]}
    audit = run(rankings=[NAMED], configurations=chosen)
    rankings = [NAMED]
    for layers in GROUPS:
        for aggregation in ("mean", "vote"):
            wanted = {"layers": layers, "aggregation": aggregation, "vote_fraction": 0.4}
            rankings.append({"estimator": "grad_dot", **wanted, "correct_only": True})
    rankings.append({"estimator": "loss", "aggregation": "mean"})
    arms, expected = arms_of(audit), arms_of(run(rankings=rankings))
    assert set(arms) == set(expected)
    assert "grad_dot/00-01/vote=0.4/correct_only" in arms
    for name, arm in arms.items():
        assert arm["metrics"] == expected[name]["metrics"], name


def test_without_a_choice_all_are_arms_but_what_is_one_anyway(
    workplace: Workplace, models: Models
) -> None:
    verify = {"seeds": [0], "configurations": {}}
    audit_id = submit_reviews(workplace, models, **ASKED, verify=verify)
    while (claim := workplace.claim(audit_id)) and claim.stage != "verify":
        workplace.execute(claim)
    arms = {arm["name"] for arm in plan_of(workplace, workplace.audit(audit_id))["arms"]}
    assert arms == {
        *("full", "filtered", "relabelled", "random", "oracle", "loss/all/mean"),
        *(
            f"{estimator}/{group}/{aggregation}"
            for estimator in ("grad_dot", "self_influence")
            for group in GROUPS
            for aggregation in ("mean", "vote=0.4")
        ),
    }


def test_the_table_has_the_asked_layers_and_the_rankings_own(
    workplace: Workplace, models: Models
) -> None:
    request = ASKED | {"ranking": ASKED["ranking"] | {"layers": "01"}}
    request |= {"layer_groups": ["CL", "00,CL"]}
    audit = workplace.succeed(submit_reviews(workplace, models, **request, verify=None, test=None))
    groups: dict[str, set[str]] = {}
    for item in audit.summary["configurations"]:
        groups.setdefault(item["estimator"], set()).add(item["layer_group"])
    assert groups == {
        "grad_dot": {"CL", "00,CL", "01"},
        "self_influence": {"CL", "00,CL"},
        "loss": {"all"},
        "random": {"all"},
        "oracle": {"all"},
    }
    assert set(audit.summary["cancellation"]) >= {"CL", "00,CL", "01"}
    assert audit.summary["group_order"] == ["CL", "00,CL", "01"]


def test_layers_that_the_model_has_not_are_refused_before_the_work(
    workplace: Workplace, models: Models
) -> None:
    request = ASKED | {"layer_groups": ["all", "CL,09"]}
    audit = workplace.finish(submit_reviews(workplace, models, **request, verify=None, test=None))
    assert (audit.error_code, audit.error_field) == ("unknown_layers", "layer_groups.1")
    assert "no block 09" in (audit.error_message or "")
    assert audit.timings.keys() == {"prepare", "fine_tune"}
