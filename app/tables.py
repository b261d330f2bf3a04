"""Every table, imported in one place so that metadata and foreign keys are whole."""

from app.audits.models import (
    Audit,
    IdempotencyKey,
    RankedSample,
    Ranking,
    TrainingSample,
    ValidationSample,
)
from app.datasets.models import Dataset
from app.decisions.models import Decision, DecisionBatch, DecisionChange
from app.experiments.models import Experiment
from app.keys.models import ApiKey
from app.limits.models import TenantLimits, WorkerUsage
from app.trail.models import TrailEntry
from app.webhooks.models import Webhook, WebhookDelivery
from app.work.models import Leftover, WorkerHeartbeat, WorkUnit

__all__ = [
    "ApiKey",
    "Audit",
    "Dataset",
    "Decision",
    "DecisionBatch",
    "DecisionChange",
    "Experiment",
    "IdempotencyKey",
    "Leftover",
    "RankedSample",
    "Ranking",
    "TenantLimits",
    "TrailEntry",
    "TrainingSample",
    "ValidationSample",
    "Webhook",
    "WebhookDelivery",
    "WorkUnit",
    "WorkerHeartbeat",
    "WorkerUsage",
]
