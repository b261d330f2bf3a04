"""Winnow's Python client: submit audits of training data, wait for them, read the suspects."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow.client import AsyncClient, Client
    from winnow.errors import (
        DownloadDamaged,
        ErrorItem,
        KeyExpiresSoon,
        MissingExtra,
        NotDoneInTime,
        ServiceUnreachable,
        WinnowError,
    )
    from winnow.requests import (
        AuditRequest,
        Columns,
        Configurations,
        DatasetSource,
        DecisionRequest,
        ExperimentRequest,
        ExperimentTask,
        ExperimentVerify,
        FineTune,
        Flag,
        ModelSource,
        PlantNoise,
        RankingRequest,
        RankingSpecification,
        SuspectFilter,
        Verify,
    )
    from winnow.results import (
        Aggregation,
        Audit,
        AuditResults,
        Dataset,
        DecisionBatch,
        DecisionPreview,
        Delivery,
        Detection,
        Done,
        Estimator,
        Experiment,
        ExperimentResults,
        LayerResult,
        LayerTable,
        NewWebhook,
        Precision,
        Progress,
        Ranking,
        RankingResults,
        SampleDecision,
        SampleDetail,
        Suspect,
        SuspectSummary,
        TrailEntry,
        Verification,
        VerificationArm,
        Webhook,
    )


__all__ = [
    "Aggregation",
    "AsyncClient",
    "Audit",
    "AuditRequest",
    "AuditResults",
    "Client",
    "Columns",
    "Configurations",
    "Dataset",
    "DatasetSource",
    "DecisionBatch",
    "DecisionPreview",
    "DecisionRequest",
    "Delivery",
    "Detection",
    "Done",
    "DownloadDamaged",
    "ErrorItem",
    "Estimator",
    "Experiment",
    "ExperimentRequest",
    "ExperimentResults",
    "ExperimentTask",
    "ExperimentVerify",
    "FineTune",
    "Flag",
    "KeyExpiresSoon",
    "LayerResult",
    "LayerTable",
    "MissingExtra",
    "ModelSource",
    "NewWebhook",
    "NotDoneInTime",
    "PlantNoise",
    "Precision",
    "Progress",
    "Ranking",
    "RankingRequest",
    "RankingResults",
    "RankingSpecification",
    "SampleDecision",
    "SampleDetail",
    "ServiceUnreachable",
    "Suspect",
    "SuspectFilter",
    "SuspectSummary",
    "TrailEntry",
    "Verification",
    "VerificationArm",
    "Verify",
    "Webhook",
    "WinnowError",
]

_HOMES = ("winnow.client", "winnow.errors", "winnow.requests", "winnow.results")


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `winnow --help` needs none of them."""
    if name == "__version__":
        return version("winnow-client")
    if name in __all__:
        for home in map(import_module, _HOMES):
            if name in vars(home):
                return vars(home)[name]
    raise AttributeError(f"module 'winnow' has no attribute {name!r}")
