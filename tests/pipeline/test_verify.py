"""Fine-tuning again without the suspects: what is trained, what is measured, what is told."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from app.audits.models import Audit
from tests.pipeline import tiny
from tests.pipeline.conftest import Models
from tests.pipeline.workplace import Workplace

FINE_TUNE: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 8, "dropout": 0.2}


def submit(workplace: Workplace, models: Models, **request: Any) -> str:
    defaults = {
        "fine_tune": FINE_TUNE,
        "plant_noise": {"fraction": 0.2},
        "test": workplace.table("test", tiny.reviews(25, seed=2)),
        "verify": {"seeds": [0, 1]},
    }
    return workplace.submit(models.encoder, **workplace.reviews(), **{**defaults, **request})


def test_every_arm_is_told_of(workplace: Workplace, models: Models) -> None:
    audit = workplace.succeed(submit(workplace, models))
    import json
    print(json.dumps(audit.summary["verification"], indent=1))
    print(audit.timings, audit.state_times)
