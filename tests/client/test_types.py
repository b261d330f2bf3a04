"""The client's types say the same as the service's, and stand alone."""

import subprocess
import sys

import pytest
import winnow.requests
import winnow.results
from pydantic import BaseModel

import app.audits.answers
import app.audits.schemas
import app.audits.verification_answers
import app.audits.verification_schemas
import app.catalogue
import app.datasets.files
import app.datasets.schemas
import app.experiments.answers
import app.experiments.schemas

ANSWERS = [
    (getattr(winnow.results, name), getattr(module, name))
    for name, module in {
        "Audit": app.audits.answers,
        "AuditError": app.audits.answers,
        "AuditResults": app.audits.answers,
        "Choice": app.audits.answers,
        "ChosenConfiguration": app.audits.answers,
        "NoiseEstimate": app.audits.answers,
        "Kept": app.audits.answers,
        "Ranking": app.audits.answers,
        "RankingResults": app.audits.answers,
        "Cancellation": app.audits.answers,
        "Verification": app.audits.verification_answers,
        "VerificationArm": app.audits.verification_answers,
        "AgainstFull": app.audits.verification_answers,
        "SeedValues": app.audits.verification_answers,
        "ProjectionReport": app.audits.answers,
        "ResultFile": app.audits.answers,
        "Detection": app.audits.answers,
        "LayerResult": app.audits.answers,
        "LayerTable": app.audits.answers,
        "Suspect": app.audits.answers,
        "SampleDetail": app.audits.answers,
        "GroupStanding": app.audits.answers,
        "RelatedSample": app.audits.answers,
        "AlikeSample": app.audits.answers,
        "ClassProbability": app.audits.answers,
        "Dataset": app.datasets.schemas,
        "Experiment": app.experiments.answers,
        "ExperimentAudit": app.experiments.answers,
        "ExperimentResults": app.experiments.answers,
        "ResultRow": app.experiments.answers,
        "WinRates": app.experiments.answers,
        "Level": app.experiments.answers,
        "Correlation": app.experiments.answers,
        "CellCorrelation": app.experiments.answers,
        "Best": app.experiments.answers,
        "Missing": app.experiments.answers,
        "Estimator": app.catalogue,
        "Aggregation": app.catalogue,
        "Parameter": app.catalogue,
    }.items()
]
REQUESTS = [
    (getattr(winnow.requests, name), getattr(app.audits.schemas, name))
    for name in (
        "AuditRequest",
        "ModelSource",
        "Projection",
        "Checkpoint",
        "DatasetSource",
        "FineTune",
        "PlantNoise",
        "RankingSpecification",
        "Configuration",
        "Probes",
        "RankingRequest",
        "Flag",
        "Verify",
    )
]
REQUESTS += [
    (winnow.requests.Configurations, app.audits.verification_schemas.Configurations),
    *(
        (getattr(winnow.requests, name), getattr(app.experiments.schemas, name))
        for name in ("ExperimentRequest", "ExperimentTask", "ExperimentVerify")
    ),
]


@pytest.mark.parametrize(
    ("own", "of_service"),
    [*ANSWERS, *REQUESTS, (winnow.requests.Columns, app.datasets.files.ColumnNames)],
    ids=lambda kind: kind.__name__,
)
def test_client_and_service_name_the_same_fields(
    own: type[BaseModel], of_service: type[BaseModel]
) -> None:
    assert own.model_fields.keys() == of_service.model_fields.keys()


def test_what_is_not_said_is_not_sent() -> None:
    """The service's defaults hold, also after they change."""
    request = winnow.requests.AuditRequest(
        model=winnow.requests.ModelSource(reference="file:///models/m"),
        train=winnow.requests.DatasetSource(reference="upload:ds_1"),
        validation=winnow.requests.DatasetSource(reference="upload:ds_2"),
        fine_tune=winnow.requests.FineTune(epochs=2),
    )
    assert request.body() == {
        "model": {"reference": "file:///models/m"},
        "train": {"reference": "upload:ds_1"},
        "validation": {"reference": "upload:ds_2"},
        "fine_tune": {"epochs": 2},
    }
    app.audits.schemas.AuditRequest.model_validate(request.body())


def test_the_client_needs_nothing_of_the_service() -> None:
    """It imports in a process where the service's packages and its heavy libraries are blocked."""
    program = """
import sys
blocked = ("app", "workers", "torch", "sqlalchemy", "celery", "fastapi", "pyarrow", "numpy")
sys.modules.update(dict.fromkeys(blocked))
import winnow, winnow.cli
"""
    subprocess.run([sys.executable, "-c", program], check=True)
