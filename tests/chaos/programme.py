"""One of every kind of work: an audit through all stages, a ranking, an export, an experiment; and
webhooks that are told of each end.
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2

from app.audits.folders import audit_folder
from app.work.leftovers import TEMPORARY
from tests.chaos.cluster import Cluster
from tests.pipeline import tiny
from tests.pipeline.tiny import reviews, save_encoder, write_table

ID = re.compile(r"\b(aud|rnk|exp|wrk|msg|bat|whk|ds)_[0-9a-f]{32}\b")
FINE_TUNE = {"epochs": 1, "learning_rate": 0.01, "batch_size": 8}
SECONDS = 600
# of one run alone: times, and what a worker needed for it
OF_A_RUN = {
    *("id", "created_at", "finished_at", "state_times", "timings", "href", "links", "seconds"),
    *("version", "audits", "request", "busy_seconds", "samples_per_second", "kept"),
    "tokens_per_second",
}


def write_files(folder: Path) -> None:
    """Write the model and the tables of the programme."""
    save_encoder(folder / "encoder")
    tables = {"train": (60, 0), "trusted": (12, 1), "test": (12, 2)}
    for name, (number, seed) in tables.items():
        write_table(folder / f"{name}.parquet", reviews(number, seed=seed))


@dataclass
class Outcome:
    """What one run of the programme left, as far as it must be the same every time.

    Attributes:
        results: by the kind of work.
        files: below the audit's folder.
        ends: how many messages of which type are owed.
    """

    results: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)


def base_request(cluster: Cluster) -> dict[str, Any]:
    """Return what the requests of audits here share."""
    return {
        "model": {"reference": f"file://{cluster.files / 'encoder'}"},
        "validation": {"reference": f"file://{cluster.files / 'trusted.parquet'}"},
        "fine_tune": FINE_TUNE,
        "max_tokens": tiny.MAX_POSITIONS,
    }


class Programme:
    """Submits the work and waits for it, however often it is interrupted."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.ids: dict[str, str] = {}

    def begin(self) -> None:
        """Upload the training set, submit the audit and the experiment."""
        path = self.cluster.files / "train.parquet"
        content = path.read_bytes()
        self.ids["dataset"] = self._post(
            "/v1/datasets", files={"file": ("train.parquet", content)}
        )["id"]
        base = base_request(self.cluster)
        test = {"reference": self._file("test")}
        audit = {
            "train": {"reference": f"upload:{self.ids['dataset']}"},
            "estimators": ["grad_cosine", "datainf"],
            "plant_noise": {"fraction": 0.2},
            "test": test,
            "verify": {"seeds": [0], "arms": ["filtered", "full"]},
        }
        self.ids["audit"] = self._post("/v1/audits", json=base | audit)["id"]
        task = {"name": "reviews", "train": {"reference": self._file("train")}}
        experiment = {
            "tasks": [base | task],
            "seeds": [0, 1],
            "estimators": ["grad_cosine"],
            "aggregations": ["rank"],
            "layer_groups": ["all"],
            "verify": None,
        }
        self.ids["experiment"] = self._post("/v1/experiments", json=experiment)["id"]

    def end(self) -> Outcome:
        """Wait for all of it, rank again, decide and export."""
        audit = self._done(f"/v1/audits/{self.ids['audit']}")
        path = f"/v1/audits/{self.ids['audit']}"
        ranking = {"estimator": "datainf", "layers": "all", "aggregation": "mean"}
        self.ids["ranking"] = self._post(f"{path}/rankings", json=ranking)["id"]
        decision = {"action": "drop", "indices": [3, 1, 4], "reviewer": "anna"}
        self._post(f"{path}/decisions", json=decision)
        export = self._get(f"{path}/export")
        ranking = self._done(f"{path}/rankings/{self.ids['ranking']}")
        experiment = self._done(f"/v1/experiments/{self.ids['experiment']}")
        tables = self._get(f"/v1/experiments/{self.ids['experiment']}/results").json()
        results = {
            "audit": audit,
            "ranking": ranking,
            "experiment": experiment,
            "tables": tables,
            "export": export.content.hex(),
        }
        return Outcome(self._same(results), self._files(), dict(self.ids))

    def _file(self, name: str) -> str:
        return f"file://{self.cluster.files / name}.parquet"

    def _files(self) -> list[str]:
        root = audit_folder(self.cluster.data_dir, self.ids["audit"])
        there = {str(path.relative_to(root)) for path in root.rglob("*")}
        there -= {str(path.relative_to(root)) for path in root.rglob(TEMPORARY)}  # for a while
        return sorted(ID.sub("ID", name) for name in there)

    def _same(self, value: Any) -> Any:
        """Return what every run must say alike."""
        match value:
            case dict():
                return {key: self._same(item) for key, item in value.items() if key not in OF_A_RUN}
            case list():
                return [self._same(item) for item in value]
            case str():
                return ID.sub("ID", value)
            case _:
                return value

    def _post(self, path: str, **content: Any) -> dict[str, Any]:
        """Ask until there is an answer, under one key: it is done once."""
        headers = {"Idempotency-Key": uuid4().hex}
        answer: dict[str, Any] = self._asked("POST", path, headers=headers, **content).json()
        return answer

    def _get(self, path: str) -> httpx2.Response:
        return self._asked("GET", path)

    def _asked(self, method: str, path: str, **content: Any) -> httpx2.Response:
        end = time.monotonic() + SECONDS
        said = ""
        while time.monotonic() < end:
            try:
                answer = self.cluster.http.request(method, path, **content)
            except httpx2.TransportError as error:
                said = repr(error)
            else:
                if answer.status_code < 300:
                    return answer
                said = answer.text
                # 503: the database is away; anything else is wrong
                assert answer.status_code in {503, 507}, f"{method} {path}: {said}"
            time.sleep(0.2)
        raise AssertionError(f"{method} {path} never answered: {said}\n{self.cluster.tail()}")

    def _done(self, path: str) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while not (found := self._get(path).json())["done"]:
            assert time.monotonic() < end, f"{found}\n{self.cluster.tail()}"
            time.sleep(0.1)
        assert found["state"] in {"succeeded", "done"}, f"{found}\n{self.cluster.tail()}"
        answer: dict[str, Any] = found
        return answer
