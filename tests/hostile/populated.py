"""A service with something of every kind in it, for requests that nobody thought of."""

import shutil
from dataclasses import dataclass, field
from typing import Any

import httpx2
from sqlalchemy import Engine, select

from app.audits.folders import audit_folder
from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.db import new_id, transaction
from app.jobs import QUEUES
from app.settings import Settings
from app.work.models import WorkerHeartbeat
from tests.factories import (
    experiment_body,
    finish_experiment,
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
    request_body,
    suggest_labels,
)

TRAIN = b"text,label\n" + b"".join(
    b"sample %d,%s\n" % (index, b"pos" if index % 2 == 0 else b"neg") for index in range(10)
)


@dataclass
class Inhabitants:
    """What requests may name.

    Attributes:
        ids: by the parameter of a path.
        bodies: that are taken, by method and path.
    """

    ids: dict[str, list[str]] = field(default_factory=dict)
    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, value: str) -> None:
        self.ids.setdefault(name, []).append(value)


def _publish(engine: Engine, settings: Settings, experiment_id: str, like: Audit) -> None:
    """Give the audits of an experiment that succeeded the results of another one."""
    with transaction(engine) as session:
        own = session.get_one(Ranking, like.summary["ranking_id"])
        folder = audit_folder(settings.data_dir, like.id) / own.folder
        of_experiment = select(Audit).where(Audit.experiment_id == experiment_id)
        for audit in session.scalars(of_experiment).all():
            if not audit.summary:
                continue
            ranking = Ranking(
                id=new_id("rnk"),
                audit_id=audit.id,
                tenant=audit.tenant,
                is_own=True,
                specification=audit.request["ranking"],
                flag=audit.request["flag"],
                state=RankingState.SUCCEEDED,
                progress=1.0,
                summary=own.summary,
            )
            ranking.folder = Ranking.folder_of(ranking.id)
            session.add(ranking)
            tables = {name: audit.summary[name] for name in ("configurations", "cancellation")}
            audit.summary = {**like.summary, **tables, "ranking_id": ranking.id}
            audit.num_train, audit.num_validation = like.num_train, like.num_validation
            audit.provenance = like.provenance
            shutil.copytree(folder, audit_folder(settings.data_dir, audit.id) / ranking.folder)


def populate(engine: Engine, settings: Settings, client: httpx2.Client) -> Inhabitants:
    """Make audits in every state, with rankings, decisions, an experiment, datasets, a webhook."""
    found = Inhabitants()

    def post(path: str, **request: Any) -> dict[str, Any]:
        answer = client.post(path, **request)
        assert answer.is_success, answer.text
        made: dict[str, Any] = answer.json()
        return made

    with transaction(engine) as session:
        session.add(
            WorkerHeartbeat(name="worker", device="cpu", queues=[*QUEUES], engine_version="1")
        )
    dataset = post("/v1/datasets", files={"file": ("train.csv", TRAIN)})
    found.add("dataset_id", dataset["id"])
    for has_labels in (True, False):
        audit = make_finished_audit(engine, settings, has_labels=has_labels)
        found.add("audit_id", audit.id)
        found.add("ranking_id", audit.summary["ranking_id"])
        found.add("ranking_id", make_ranking(engine, audit).id)
        if has_labels:
            labelled = audit
            found.add("ranking_id", make_ranking(engine, audit, settings=settings).id)
            suggest_labels(engine, audit.summary["ranking_id"])
        for action in ("drop", "keep"):
            decided = {"action": action, "indices": [1, 2]}
            found.add("batch_id", post(f"/v1/audits/{audit.id}/decisions", json=decided)["id"])
    for state in (AuditState.FAILED, AuditState.CANCELLED):
        found.add("audit_id", make_ended_audit(engine, state).id)
    found.add("audit_id", make_audit(engine).id)
    body = request_body(train={"reference": dataset["reference"]})
    found.add("audit_id", post("/v1/audits", json=body)["id"])
    ranking = {"estimator": "grad_cosine", "layers": "all", "aggregation": "mean"}
    found.bodies = {
        "POST /v1/audits": [body, request_body()],
        "POST /v1/experiments": [experiment_body()],
        "POST /v1/audits/{audit_id}/rankings": [ranking],
        "POST /v1/webhooks": [{"url": "https://example.com/hook"}],
        **{
            f"POST /v1/audits/{{audit_id}}/decisions{suffix}": [
                {"action": "drop", "indices": [3]},
                {"action": "keep", "filter": {"flagged": True}},
            ]
            for suffix in ("", "/preview")
        },
    }
    for states in ((AuditState.SUCCEEDED, AuditState.SUCCEEDED), (AuditState.FAILED, None)):
        experiment = post("/v1/experiments", json=experiment_body())
        finish_experiment(engine, experiment["id"], states)
        _publish(engine, settings, experiment["id"], like=labelled)
        found.add("experiment_id", experiment["id"])
    for event in ("audit.succeeded", "ranking.failed"):
        hook = {"url": "https://example.com/hook", "events": [event]}
        webhook = post("/v1/webhooks", json=hook)
        found.add("webhook_id", webhook["id"])
        post(f"/v1/webhooks/{webhook['id']}/test")
        sent = client.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
        found.add("delivery_id", sent[0]["id"])
    return found
