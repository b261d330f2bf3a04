"""The client's calls about experiments, against the real application over HTTP."""

from pathlib import Path

import pytest
from sqlalchemy import Engine
from winnow import (
    Client,
    DatasetSource,
    Experiment,
    ExperimentRequest,
    ExperimentTask,
    ExperimentVerify,
    ModelSource,
    NotDoneInTime,
    WinnowError,
)

from app.audits.models import AuditState
from tests.factories import experiment_body, finish_experiment

REQUEST = ExperimentRequest(
    tasks=[
        ExperimentTask(
            name="reviews",
            model=ModelSource(reference="hf://org/model@main"),
            train=DatasetSource(reference="hf://datasets/org/texts@main?split=train"),
            validation=DatasetSource(reference="hf://datasets/org/texts@main?split=validation"),
            test=DatasetSource(reference="hf://datasets/org/texts@main?split=test"),
        )
    ],
    seeds=[0, 1],
    verify=ExperimentVerify(fraction=0.2),
)


def test_from_the_request_to_the_tables(client: Client, engine: Engine, tmp_path: Path) -> None:
    made = client.experiments.submit(REQUEST, idempotency_key="mine")
    assert client.experiments.submit(REQUEST, idempotency_key="mine").id == made.id
    assert (made.state, made.num_audits) == ("running", 2)
    assert made.request["verify"]["fraction"] == 0.2
    assert client.get(made.audits[0].id).experiment_id == made.id
    with pytest.raises(WinnowError, match="no results yet"):
        client.experiments.results(made.id)
    with pytest.raises(NotDoneInTime, match=made.id):
        client.experiments.wait(made.id, timeout=0.2, poll_seconds=0.1)

    finish_experiment(engine, made.id, [AuditState.SUCCEEDED] * 2)
    seen: list[Experiment] = []
    assert client.experiments.wait(made.id, progress=seen.append).state == "succeeded"
    assert [experiment.num_ended for experiment in seen] == [2]
    results = client.experiments.results(made.id)
    assert not results.is_partial
    assert {row.seed for row in results.rows} == {0, 1}
    path = client.experiments.download(made.id, tmp_path / "rows.csv")
    assert len(path.read_text().splitlines()) == 1 + len(results.rows)
    client.experiments.delete(made.id)
    with pytest.raises(WinnowError, match="There is no experiment"):
        client.experiments.get(made.id)


def test_cancelled_ones_stay_in_the_list(client: Client) -> None:
    made = [client.experiments.submit(experiment_body()) for _ in range(3)]
    assert client.experiments.cancel(made[1].id).state == "cancelled"
    listed = list(client.experiments.list(page_size=2))
    assert [each.id for each in listed] == [each.id for each in reversed(made)]
    assert [each.state for each in listed] == ["running", "cancelled", "running"]
