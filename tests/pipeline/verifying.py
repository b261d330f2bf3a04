"""Audits of reviews with a verification, and what they say of their arms."""

import json
from typing import Any

from app.audits.models import Audit
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace
from workers.pipeline.artifacts import read_tensors

FINE_TUNE: dict[str, Any] = {
    "epochs": 4,
    "learning_rate": 2e-2,
    "batch_size": 8,
    "dropout": 0.1,
    "target_modules": ["all-linear"],
}
TRAIN, TEST = tiny.reviews(60, seed=0), tiny.reviews(25, seed=2)


def submit_reviews(workplace: Workplace, models: Models, **request: Any) -> str:
    """Submit an audit of reviews with planted noise, fine-tuning and a verification."""
    defaults = {
        "fine_tune": FINE_TUNE,
        "plant_noise": {"fraction": 0.2},
        "test": workplace.table("test", TEST),
        "verify": {"seeds": [0, 1]},
    }
    return workplace.submit(models.encoder, **workplace.reviews() | defaults | request)


def arms_of(audit: Audit) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in audit.summary["verification"]["arms"]}


def plan_of(workplace: Workplace, audit: Audit) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(workplace.artifacts(audit.id).plan.read_text())
    return plan


def kept_rows(workplace: Workplace, audit: Audit, arm: str, *, seed: int = 0) -> list[int]:
    """Read which training samples an arm keeps."""
    artifacts, plan = workplace.artifacts(audit.id), plan_of(workplace, audit)
    (planned,) = [item for item in plan["arms"] if item["name"] == arm]
    place = audit.request["verify"]["seeds"].index(seed)
    number = plan["trainings"][planned["trainings"][place]]["data"]
    kept_T = read_tensors(artifacts.kept_sets)[f"kept/{number:05d}"]
    rows: list[int] = kept_T.nonzero().flatten().tolist()
    return rows


def without_lowest(scores: list[float], fraction: float) -> list[int]:
    order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    return sorted(order[round(fraction * len(scores)) :])
