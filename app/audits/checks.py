"""What can be checked of an audit's request without a model: references, columns, known noise."""

from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.schemas import AuditRequest, DatasetSource
from app.catalogue import ESTIMATORS
from app.datasets.files import ColumnNames, DatasetError, FileFormat, guess_format
from app.datasets.readers import open_table
from app.datasets.repository import find_dataset
from app.datasets.service import HEAD_BYTES, dataset_limits
from app.errors import InvalidRequest
from app.references import (
    FileReference,
    InvalidReference,
    UploadReference,
    parse_dataset_reference,
    parse_model_reference,
    resolve_file,
)
from app.settings import Settings

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"


def check_request(
    engine: Engine, settings: Settings, *, tenant: str, request: AuditRequest
) -> AuditRequest:
    """Check a request and fill in the columns that its datasets are read with.

    Raises:
        InvalidRequest: the field that is wrong and what to change.
    """
    _check_model(settings, request.model.reference, "#/model/reference", MODEL_CONFIG)
    if request.model.adapter is not None:
        _check_model(settings, request.model.adapter, "#/model/adapter", ADAPTER_CONFIG)
    with Session(engine) as session:
        filled = {
            name: source.model_copy(
                update={"columns": _columns_of(session, settings, tenant, source, f"#/{name}")}
            )
            for name, source in (("train", request.train), ("validation", request.validation))
        }
    checked = request.model_copy(update=filled)
    _check_noise(request, checked)
    return checked


def uploads_of(request: AuditRequest) -> dict[str, str]:
    """Return the uploads that a request reads: id to the pointer of the field that names it."""
    uploads: dict[str, str] = {}
    for name, source in (("train", request.train), ("validation", request.validation)):
        reference = parse_dataset_reference(source.reference)
        if isinstance(reference, UploadReference):
            uploads[reference.id] = f"#/{name}/reference"
    return uploads


def missing_upload(pointer: str, dataset_id: str) -> InvalidRequest:
    """Return the error for an upload that is not there."""
    return InvalidRequest.at(
        pointer,
        f"There is no upload {dataset_id}. Upload the file with POST /v1/datasets and use the "
        "reference that it answers.",
    )


def _check_model(settings: Settings, text: str, pointer: str, config: str) -> None:
    try:
        reference = parse_model_reference(text)
        if not isinstance(reference, FileReference):
            return
        folder = resolve_file(reference.path, settings.file_roots)
    except InvalidReference as error:
        raise InvalidRequest.at(pointer, f"{error}.") from error
    if not folder.is_dir():
        raise InvalidRequest.at(
            pointer, f"{reference.path} is a file; name the folder that holds {config}."
        )
    names = {path.name for path in folder.iterdir()}
    if config not in names:
        other = ADAPTER_CONFIG if config == MODEL_CONFIG else MODEL_CONFIG
        hint = ""
        if other in names:
            hint = (
                " It is an adapter: name its base model here and the adapter in model.adapter."
                if config == MODEL_CONFIG
                else " It is a whole model: name it in model.reference."
            )
        raise InvalidRequest.at(pointer, f"{reference.path} holds no {config}.{hint}")
    if not any(name.endswith(".safetensors") for name in names):
        raise InvalidRequest.at(
            pointer,
            f"{reference.path} holds no weights as safetensors, the only form that is loaded; "
            "save it with save_pretrained(…, safe_serialization=True).",
        )


def _columns_of(
    session: Session, settings: Settings, tenant: str, source: DatasetSource, pointer: str
) -> ColumnNames:
    try:
        reference = parse_dataset_reference(source.reference)
        if isinstance(reference, UploadReference):
            return _upload_columns(session, tenant, reference.id, source, pointer)
        columns = source.columns or ColumnNames()
        if isinstance(reference, FileReference):
            path = resolve_file(reference.path, settings.file_roots)
            _check_file(settings, path, reference.path, columns, pointer)
    except InvalidReference as error:
        raise InvalidRequest.at(f"{pointer}/reference", f"{error}.") from error
    return columns


def _upload_columns(
    session: Session, tenant: str, dataset_id: str, source: DatasetSource, pointer: str
) -> ColumnNames:
    dataset = find_dataset(session, tenant, dataset_id)
    if dataset is None:
        raise missing_upload(f"{pointer}/reference", dataset_id)
    if source.columns is None:
        return ColumnNames.model_validate(dataset.columns)
    names = [column["name"] for column in dataset.summary["columns"]]
    for field, name in source.columns.by_field().items():
        if name not in names:
            raise InvalidRequest.at(
                f"{pointer}/columns/{field}",
                f"The upload {dataset_id} has no column {name!r}; it has {', '.join(names)}.",
            )
    return source.columns


def _check_file(
    settings: Settings, path: Path, given: Path, columns: ColumnNames, pointer: str
) -> None:
    """Check what a file's first rows tell; the worker checks every row."""
    if not path.is_file():
        raise InvalidRequest.at(
            f"{pointer}/reference", f"{given} is a folder; name one Parquet, JSONL or CSV file."
        )
    try:
        with path.open("rb") as file:
            file_format: FileFormat = guess_format(given.name, file.read(HEAD_BYTES))
        open_table(path, format=file_format, columns=columns, limits=dataset_limits(settings))
    except DatasetError as error:
        place = f"columns/{error.field}" if error.field else "reference"
        raise InvalidRequest.at(f"{pointer}/{place}", f"{given}: {error.message}.") from error
    except OSError as error:
        raise InvalidRequest.at(
            f"{pointer}/reference",
            f"{given} cannot be read by the server: {error.strerror or error}.",
        ) from error


def _check_noise(request: AuditRequest, checked: AuditRequest) -> None:
    has_noise_column = bool(checked.train.columns and checked.train.columns.noise)
    if request.plant_noise and has_noise_column:
        raise InvalidRequest.at(
            "#/plant_noise",
            "The upload of the training set has a column of known noise, and plant_noise adds "
            "more. Leave out plant_noise, or give train.columns without noise.",
        )
    if request.plant_noise or has_noise_column:
        return
    pointers = [f"#/estimators/{place}" for place in range(len(request.estimators))]
    asked = [*zip(pointers, request.estimators, strict=True)]
    asked.append(("#/ranking/estimator", request.ranking.estimator))
    for pointer, name in asked:
        if ESTIMATORS[name].needs_known_noise:
            raise InvalidRequest.at(
                pointer,
                f"The estimator {name.value} needs known noise: name its column in "
                "train.columns.noise, or let plant_noise flip labels.",
            )
