"""Whole experiments on tiny models: the service makes the audits, a worker does them."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.experiments.assemble import assemble_results, rows_of
from app.experiments.schemas import ExperimentRequest
from app.experiments.service import ExperimentWithAudits, results_of, submit
from tests.factories import TENANT
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace

FINE_TUNE: dict[str, Any] = {
    "epochs": 2,
    "learning_rate": 2e-2,
    "batch_size": 8,
    "target_modules": ["all-linear"],
}


@pytest.fixture
def tasks(workplace: Workplace, models: Models) -> list[dict[str, Any]]:
    """A classifier and a causal language model."""

    def sets(name: str, make: Any) -> dict[str, Any]:
        return {
            part: workplace.table(f"{name}_{part}", make(number, seed=seed))
            for seed, (part, number) in enumerate(
                {"train": 30, "validation": 8, "test": 12}.items()
            )
        }

    common = {"fine_tune": FINE_TUNE, "max_tokens": 64}
    return [
        {
            "name": "reviews",
            "model": {"reference": f"file://{models.encoder}"},
            **sets("reviews", tiny.reviews),
            **common,
        },
        {
            "name": "instructions",
            "task": "causal_lm",
            "model": {"reference": f"file://{models.llama}"},
            **sets("instructions", tiny.instructions),
            **common,
        },
    ]


def run(workplace: Workplace, **request: Any) -> ExperimentWithAudits:
    """Submit an experiment, do all its audits, and return it with what they found."""
    submission = submit(
        workplace.engine,
        workplace.settings,
        tenant=TENANT,
        request=ExperimentRequest.model_validate(request),
        idempotency_key=None,
    )
    for audit in submission.made.audits:
        workplace.succeed(audit.id)
    with Session(workplace.engine, expire_on_commit=False) as session:
        return results_of(session, tenant=TENANT, experiment_id=submission.made.experiment.id)


def test_two_tasks_with_two_seeds(workplace: Workplace, tasks: list[dict[str, Any]]) -> None:
    found = run(
        workplace,
        tasks=tasks,
        seeds=[0, 4],
        estimators=["grad_dot", "grad_cosine"],
        layer_groups=["all", "01", "00-01"],
        aggregations=["mean", "rank"],
        verify={"aggregations": ["rank"]},
    )
    rows = rows_of(found)
    cells = [cell for cell, _ in found.cells()]
    assert [(cell.task, cell.seed) for cell in cells] == [
        *(("reviews", 0), ("reviews", 4)),
        *(("instructions", 0), ("instructions", 4)),
    ]
    for cell, audit in found.cells():
        mine = [row for row in rows if row.cell == cell]
        configurations = [row for row in mine if not row.is_baseline]
        assert {row.configuration for row in configurations} == {
            (estimator, group, aggregation, "False")
            for estimator in ("grad_dot", "grad_cosine")
            for group in ("all", "01", "00-01")
            for aggregation in ("mean", "rank")
        }
        of_classes = {"confidence"} if cell.task == "reviews" else set()
        assert {row.estimator for row in mine if row.is_baseline} == {
            *("loss", "random", "oracle", "full"),
            *of_classes,
        }
        # the table and the arms say the same of the same configuration
        table = {
            (item["estimator"], item["layer_group"], item["aggregation"]): item["detection"]
            for item in audit.summary["configurations"]
            if not item["correct_only"]
        }
        arms = {arm["name"]: arm for arm in audit.summary["verification"]["arms"]}
        measure = "accuracy" if cell.task == "reviews" else "loss"
        for row in configurations:
            key = row.estimator, row.layer_group, row.aggregation
            assert row.detection == table[key]
            assert (
                row.cancellation["cancellation_l1"]
                == (audit.summary["cancellation"][row.layer_group]["l1"])
            )
            if row.aggregation == "rank":
                arm = arms["/".join(map(str, key))]
                assert row.measured[measure] == arm["metrics"][measure]["mean"]
                assert row.num_train == 21
            else:
                assert row.measured == {}
        baselines = {row.estimator: row for row in mine if row.is_baseline}
        assert baselines["full"].num_train == 30
        assert baselines["loss"].num_train == 21
        assert baselines["oracle"].num_train == 30 - audit.summary["num_noisy"]

    results = assemble_results(found)
    assert not results.is_partial
    assert {table.model for table in results.win_rates} == {
        *(None, tasks[0]["model"]["reference"], tasks[1]["model"]["reference"])
    }
    measures = {table.measure for table in results.win_rates if table.factor == "layer_group"}
    assert measures == {"auc_ndr", "ndr_30", "accuracy", "negative_loss"}
    over_layers = [item for item in results.correlations if item.over == "layer_groups"]
    assert all(len(item.audits) == 4 for item in over_layers)


def test_noise_that_is_known_and_no_verification(
    workplace: Workplace, tasks: list[dict[str, Any]]
) -> None:
    table = tiny.reviews(30, seed=0)
    noise = [place % 5 == 0 for place in range(30)]
    train = workplace.table("known", table | {"noise": noise})
    task = tasks[0] | {"train": train | {"columns": {"noise": "noise"}}, "test": None}
    found = run(
        workplace,
        tasks=[task],
        seeds=[0],
        estimators=["self_influence"],
        aggregations=["mean"],
        noise_fraction=None,
        verify=None,
    )
    results = assemble_results(found)
    assert {row.layer_group for row in results.rows} == {"all", "00", "01", "CL", None}
    assert all(row.accuracy is None and row.num_train is None for row in results.rows)
    assert {table.measure for table in results.win_rates} == {"auc_ndr", "ndr_30"}
    assert results.correlations == []
    (best, _) = results.best
    assert set(best.beside) == {"loss", "confidence", "random", "oracle"}
