"""What an experiment answers when it has ended."""

import csv
import io
import json

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.audits.models import AuditState
from tests.app.experimenting import post
from tests.factories import experiment_body, finish_experiment


class TestResults:
    def test_there_are_none_before_the_end(self, client: TestClient, engine: Engine) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], [AuditState.SUCCEEDED, None])
        for name in ("results", "results.csv"):
            response = client.get(f"{path}/{name}")
            assert response.status_code == 409
            assert "1 of 2 audits have ended" in response.json()["detail"]
            assert response.headers["Retry-After"] == "15"

    def test_there_are_none_when_nothing_succeeded(
        self, client: TestClient, engine: Engine
    ) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], [AuditState.FAILED] * 2)
        response = client.get(f"{path}/results")
        assert response.status_code == 409
        assert "It did not work." in response.json()["detail"]
        assert "results" not in client.get(path).json()["links"]

    def test_the_tables_tell_what_is_missing(self, client: TestClient, engine: Engine) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(
            engine, path.rpartition("/")[2], [AuditState.SUCCEEDED, AuditState.FAILED]
        )
        results = client.get(client.get(path).json()["links"]["results"]).json()
        assert results["is_partial"]
        (missing,) = results["missing"]
        assert (missing["task"], missing["seed"], missing["state"]) == ("reviews", 1, "failed")
        assert missing["error"]["message"] == "It did not work."
        assert {row["seed"] for row in results["rows"]} == {0}

    def test_the_rows_as_json_and_as_csv_are_the_same(
        self, client: TestClient, engine: Engine
    ) -> None:
        path = post(client, experiment_body()).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], [AuditState.SUCCEEDED] * 2)
        rows = client.get(f"{path}/results").json()["rows"]
        response = client.get(f"{path}/results.csv")
        assert response.headers["Content-Type"].startswith("text/csv")
        lines = list(csv.DictReader(io.StringIO(response.text)))
        assert [list(line) for line in lines] == [list(row) for row in rows]
        for line, row in zip(lines, rows, strict=True):
            for name, value in row.items():
                expected = "" if value is None else str(value)
                assert line[name] == expected, json.dumps(row)

    def test_the_tables_of_two_seeds(self, client: TestClient, engine: Engine) -> None:
        """datainf finds the noise better and leaves the better model in both."""
        path = post(client, experiment_body(estimators=["grad_dot", "datainf"])).headers["Location"]
        finish_experiment(engine, path.rpartition("/")[2], [AuditState.SUCCEEDED] * 2)
        results = client.get(f"{path}/results").json()
        assert not results["is_partial"]
        rates = {
            (table["factor"], table["measure"]): {
                level["level"]: level["win_rate"] for level in table["levels"]
            }
            for table in results["win_rates"]
        }
        assert rates["estimator", "auc_ndr"] == {"datainf": 1.0, "grad_dot": 0.0}
        assert rates["estimator", "accuracy"] == {"datainf": 1.0, "grad_dot": 0.0}
        correlations = {
            (item["predictor"], item["outcome"], item["over"]): item
            for item in results["correlations"]
        }
        found = correlations["auc_ndr", "accuracy", "configurations"]
        assert found["mean"] == pytest.approx(1.0)
        assert [item["num_points"] for item in found["audits"]] == [4, 4]
        best = {item["measure"]: item for item in results["best"]}
        assert best["accuracy"]["estimator"] == "datainf"
        assert best["accuracy"]["layer_group"] == "CL"
        assert set(best["accuracy"]["beside"]) == {"loss", "random", "oracle", "full"}
