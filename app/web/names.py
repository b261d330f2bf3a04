"""How numbers, times and references are written for people."""

import math
from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.datasets.models import Dataset

_UPLOAD = "upload:"
_MINUTE, _HOUR = 60, 3600
_SMALL = 1e-3
# shares below and above which a whole per cent says too little
_LITTLE, _NEARLY_ALL = 0.1, 0.995
_LARGE = 1e5


def count(number: int) -> str:
    """Return a whole number with separators."""
    return f"{number:,}"


def share(value: float | None) -> str:
    """Return a share as per cent: one digit more where it is small."""
    if value is None or not math.isfinite(value):
        return "–"
    is_fine = value < _LITTLE or value > _NEARLY_ALL
    return f"{value:.1%}" if is_fine else f"{value:.0%}"


def score(value: float) -> str:
    """Return a score in four significant digits."""
    if not math.isfinite(value):
        return str(value)
    if value and not _SMALL <= abs(value) < _LARGE:
        return f"{value:.2e}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return how long something takes, in the two largest units."""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def model_name(reference: str) -> str:
    """Return a reference's last part, or owner/name of a hub."""
    if reference.startswith("hf://"):
        return reference.removeprefix("hf://").removeprefix("datasets/").split("?")[0]
    return reference.rstrip("/").rpartition("/")[2]


class DatasetNames:
    """What datasets are called."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    @classmethod
    def of(cls, session: Session, audits: list[Audit]) -> "DatasetNames":
        """Look up the uploads that some audits read; one that is deleted keeps its id."""
        references = {
            source["reference"].removeprefix(_UPLOAD)
            for audit in audits
            for source in (audit.request["train"], audit.request["validation"])
            if source and source["reference"].startswith(_UPLOAD)
        }
        statement = select(Dataset.id, Dataset.name).where(Dataset.id.in_(references))
        tenants = {audit.tenant for audit in audits}
        statement = statement.where(Dataset.tenant.in_(tenants))
        return cls({row.id: row.name for row in session.execute(statement)})

    def __call__(self, reference: str) -> str:
        """Return an upload's name, or the last part of another reference."""
        if reference.startswith(_UPLOAD):
            dataset_id = reference.removeprefix(_UPLOAD)
            return self._names.get(dataset_id, dataset_id)
        return model_name(reference)
