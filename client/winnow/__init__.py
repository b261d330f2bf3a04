"""Winnow's Python client: submit audits of training data, wait for them, read the suspects."""

from importlib.metadata import version

from winnow.client import Client
from winnow.errors import (
    DownloadDamaged,
    ErrorItem,
    NotDoneInTime,
    ServiceUnreachable,
    WinnowError,
)
from winnow.requests import (
    AuditRequest,
    Columns,
    DatasetSource,
    FineTune,
    Flag,
    ModelSource,
    PlantNoise,
    RankingRequest,
    RankingSpecification,
    Verify,
)
from winnow.results import (
    Aggregation,
    Audit,
    AuditResults,
    Dataset,
    Detection,
    Estimator,
    LayerResult,
    LayerTable,
    Ranking,
    RankingResults,
    SampleDetail,
    Suspect,
    Verification,
    VerificationArm,
)

__version__ = version("winnow-client")

__all__ = [
    "Aggregation",
    "Audit",
    "AuditRequest",
    "AuditResults",
    "Client",
    "Columns",
    "Dataset",
    "DatasetSource",
    "Detection",
    "DownloadDamaged",
    "ErrorItem",
    "Estimator",
    "FineTune",
    "Flag",
    "LayerResult",
    "LayerTable",
    "ModelSource",
    "NotDoneInTime",
    "PlantNoise",
    "Ranking",
    "RankingRequest",
    "RankingResults",
    "RankingSpecification",
    "SampleDetail",
    "ServiceUnreachable",
    "Suspect",
    "Verification",
    "VerificationArm",
    "Verify",
    "WinnowError",
]
