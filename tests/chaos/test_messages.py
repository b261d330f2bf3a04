"""What the queue holds need not be true: old forms, unknown ids, and work that kills."""

from typing import Any

import pytest

from app.jobs import CPU_QUEUE_NAME, QUEUE_NAME
from tests.chaos.cluster import Cluster
from tests.chaos.conftest import Site
from tests.chaos.faults import message
from tests.chaos.programme import base_request

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]

FORMS: tuple[dict[str, Any], ...] = (
    {"args": ["wrk_of_nobody"]},
    {"args": []},
    {"args": ["a", "b"]},
    {"args": [{"unit": 1}]},
    {"args": [None]},
    {"kwargs": {"unit": "wrk_1", "version": 2}},
    {"task": "winnow.shard", "args": ["wrk_1"]},
)


def finish(cluster: Cluster) -> dict[str, Any]:
    """Submit a small audit and return how it ended."""
    body = base_request(cluster) | {"flag": {"fraction": 0.2}, "estimators": ["grad_cosine"]}
    body["train"] = {"reference": f"file://{cluster.files / 'train.parquet'}"}
    body["ranking"] = {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"}
    answer = cluster.http.post("/v1/audits", json=body)
    assert answer.status_code == 202, answer.text
    path = answer.headers["Location"]
    cluster.wait_for(lambda: cluster.http.get(path).json()["done"], seconds=600)
    audit: dict[str, Any] = cluster.http.get(path).json()
    return audit


def test_messages_of_other_versions_are_dropped_and_hold_nothing_up(site: Site) -> None:
    """As in a rolling upgrade, where the queue still holds what the version before has sent."""
    cluster = site.cluster
    starts = [worker.num_starts for worker in cluster.workers]
    with cluster.redis() as broker:
        for queue in (QUEUE_NAME, CPU_QUEUE_NAME):
            for form in FORMS:
                broker.lpush(queue, message(**form))
    assert finish(cluster)["state"] == "succeeded"
    with cluster.redis() as broker:
        assert [broker.llen(queue) for queue in (QUEUE_NAME, CPU_QUEUE_NAME)] == [0, 0]
    assert [worker.num_starts for worker in cluster.workers] == starts


def test_bytes_that_are_no_message_cost_a_worker_process_and_nothing_else(site: Site) -> None:
    """Celery ends itself over them, once for each: they are taken from the queue before."""
    cluster = site.cluster
    with cluster.redis() as broker:
        broker.lpush(QUEUE_NAME, b"nonsense")
    assert finish(cluster)["state"] == "succeeded"


def test_work_that_kills_its_worker_is_tried_three_times_and_named(site: Site) -> None:
    cluster = site.cluster
    orders = [cluster.order("unit.claimed@validation", "kill") for _ in range(4)]
    audit = finish(cluster)
    assert (audit["state"], audit["error"]["code"]) == ("failed", "worker_lost")
    assert "Stage validation, part 0, lost its worker 3 times" in audit["error"]["message"]
    assert [cluster.taken_by(order) is None for order in orders] == [False, False, False, True]
    orders[-1].unlink()
    assert finish(cluster)["state"] == "succeeded"  # the workers are as good as new
