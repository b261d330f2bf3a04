"""What can be checked of an audit's request without a model: references, columns, known noise."""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.audits.fitting import named_estimators
from app.audits.model_folders import gguf_files, has_chat_template
from app.audits.ranking_fitting import Path as FieldPath
from app.audits.schemas import AuditRequest, DatasetSource, Task
from app.audits.verification_schemas import ArmName
from app.catalogue import ESTIMATORS
from app.datasets.columns import columns_by_header, default_columns
from app.datasets.files import ColumnNames, DatasetError, DatasetLimits, guess_format
from app.datasets.readers import open_table, read_header
from app.datasets.repository import find_dataset
from app.datasets.service import HEAD_BYTES, dataset_limits
from app.errors import InvalidRequest
from app.opening import open_resolved, path_of
from app.outbound import may_be_called, outbound_policy
from app.references import (
    DatasetReference,
    FileReference,
    InvalidReference,
    ObjectReference,
    UploadReference,
    WebReference,
    check_object,
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
    for number, checkpoint in enumerate(request.model.checkpoints or ()):
        pointer = f"#/model/checkpoints/{number}/adapter"
        _check_model(settings, checkpoint.adapter, pointer, ADAPTER_CONFIG)
    with Session(engine) as session:
        filled = {
            name: source.model_copy(
                update={
                    "columns": _columns_of(
                        session, settings, tenant, source, f"#/{name}", task=request.task
                    )
                }
            )
            for name, source in _sources(request)
        }
    for name in filled.keys() - {"train"}:
        filled[name] = _without_noise(filled[name])
    checked = request.model_copy(update=filled)
    _check_kind(checked)
    _check_template(settings, checked)
    _check_noise(request, checked)
    return _with_arms(checked)


def _sources(request: AuditRequest) -> Iterator[tuple[str, DatasetSource]]:
    """Yield the datasets of a request with their fields."""
    yield "train", request.train
    if request.validation is not None:
        yield "validation", request.validation
    if request.test is not None:
        yield "test", request.test


def _with_arms(checked: AuditRequest) -> AuditRequest:
    """Return the request with the arms of its verification named."""
    if checked.verify is None:
        return checked
    arms = checked.verify.arms_of(task=checked.task, knows_noise=knows_noise(checked))
    verify = checked.verify.model_copy(update={"arms": arms})
    return checked.model_copy(update={"verify": verify})


def _without_noise(source: DatasetSource) -> DatasetSource:
    """Return a trusted set without its upload's column of known noise."""
    if source.columns is None:
        return source
    columns = source.columns.model_copy(update={"noise": None})
    return source.model_copy(update={"columns": columns})


def _check_kind(checked: AuditRequest) -> None:
    """Check that the columns, an upload's own among them, fit the task."""
    for name, source in _sources(checked):
        is_labelled = source.columns is not None and source.columns.kind == "classification"
        if is_labelled != (checked.task == "classification"):
            raise InvalidRequest.at(
                f"#/{name}",
                f"The {name} set has {'labels' if is_labelled else 'completions'}, which a "
                f"{checked.task} audit does not read. Set task to "
                f"{'classification' if is_labelled else 'causal_lm'}, or name another dataset.",
            )


def _check_template(settings: Settings, checked: AuditRequest) -> None:
    """Check that chats meet a tokenizer that can write them; a hub's is seen by the worker."""
    reference = parse_model_reference(checked.model.reference)
    if not isinstance(reference, FileReference):
        return
    folder = resolve_file(reference.path, settings.file_roots)
    if gguf_files(folder) or has_chat_template(folder):
        return
    for name, source in _sources(checked):
        if source.columns is not None and source.columns.kind == "chat":
            raise InvalidRequest.at(
                f"#/{name}/columns/messages",
                f"The tokenizer of {reference.path} has no chat template, so messages cannot be "
                "written as the model reads them. Give columns prompt and completion instead, or "
                "a model with chat_template in its tokenizer_config.json.",
            )


def uploads_of(request: AuditRequest) -> dict[str, str]:
    """Return the uploads that a request reads: id to the pointer of the field that names it."""
    uploads: dict[str, str] = {}
    for name, source in _sources(request):
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
        if isinstance(reference, ObjectReference):
            check_object(reference, settings.s3_roots)
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
    if config == MODEL_CONFIG and (ggufs := gguf_files(folder)):
        if len(ggufs) > 1:
            raise InvalidRequest.at(
                pointer,
                f"{reference.path} holds several GGUF files ({', '.join(ggufs[:5])}); name a "
                "folder with one.",
            )
        return
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
            f"{reference.path} holds no weights as safetensors (or one GGUF file); save it with "
            "save_pretrained(…, safe_serialization=True).",
        )


def _columns_of(
    session: Session,
    settings: Settings,
    tenant: str,
    source: DatasetSource,
    pointer: str,
    *,
    task: Task,
) -> ColumnNames:
    try:
        reference = parse_dataset_reference(source.reference)
        if isinstance(reference, UploadReference):
            return _upload_columns(session, tenant, reference.id, source, pointer)
        _check_place(settings, reference)
        columns = source.columns or default_columns(task)
        if isinstance(reference, FileReference):
            resolved = resolve_file(reference.path, settings.file_roots)
            with _opened(resolved, reference.path, pointer) as file:
                columns = _file_columns(
                    path_of(file, resolved),
                    reference.path,
                    source,
                    pointer,
                    limits=dataset_limits(settings),
                    task=task,
                )
    except InvalidReference as error:
        raise InvalidRequest.at(f"{pointer}/reference", f"{error}.") from error
    return columns


def _check_place(settings: Settings, reference: DatasetReference) -> None:
    """Check where a dataset is fetched from; names are looked up, and checked, by the worker.

    Raises:
        InvalidReference: this server does not call there.
    """
    if isinstance(reference, ObjectReference):
        check_object(reference, settings.s3_roots)
    elif isinstance(reference, WebReference):
        if not settings.https_datasets:
            raise InvalidReference(
                f"{reference}: this server fetches nothing from https:// addresses; its operator "
                "allows them with WINNOW_HTTPS_DATASETS"
            )
        if not may_be_called(outbound_policy(settings.fetch_networks), reference.host):
            raise InvalidReference(
                f"{reference}: this is not a public address, and only those are called; an "
                "operator can allow networks by WINNOW_FETCH_NETWORKS"
            )


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


def _opened(path: Path, given: Path, pointer: str) -> BufferedReader:
    """Return a table file, open, so that no other can come in its place."""
    if not path.is_file():
        raise InvalidRequest.at(
            f"{pointer}/reference", f"{given} is a folder; name one Parquet, JSONL or CSV file."
        )
    try:
        return open_resolved(path)
    except OSError as error:
        raise InvalidRequest.at(
            f"{pointer}/reference",
            f"{given} cannot be read by the server: {error.strerror or error}.",
        ) from error


def _file_columns(
    path: Path,
    given: Path,
    source: DatasetSource,
    pointer: str,
    *,
    limits: DatasetLimits,
    task: Task,
) -> ColumnNames:
    """Return the columns that a file is read with; the worker checks every row of them."""
    columns = source.columns or default_columns(task)
    try:
        with path.open("rb") as file:
            file_format = guess_format(given.name, file.read(HEAD_BYTES))
        if source.columns is None and task == "causal_lm":
            header = read_header(path, format=file_format, limits=limits)
            if "messages" in (names := {column.name for column in header}):
                columns = columns_by_header(sorted(names))
        open_table(path, format=file_format, columns=columns, limits=limits)
    except DatasetError as error:
        place = f"columns/{error.field}" if error.field else "reference"
        raise InvalidRequest.at(f"{pointer}/{place}", f"{given}: {error.message}.") from error
    return columns


def _check_noise(request: AuditRequest, checked: AuditRequest) -> None:
    has_noise_column = bool(checked.train.columns and checked.train.columns.noise)
    if request.plant_noise and has_noise_column:
        raise InvalidRequest.at(
            "#/plant_noise",
            "The upload of the training set has a column of known noise, and plant_noise adds "
            "more. Leave out plant_noise, or give train.columns without noise.",
        )
    if knows_noise(checked):
        return
    asked: list[tuple[FieldPath, str]] = [
        (path, f"estimator {name.value}")
        for path, name in named_estimators(request)
        if "known_noise" in ESTIMATORS[name].needs
    ]
    for place, arm in enumerate((request.verify and request.verify.arms) or ()):
        if arm is ArmName.ORACLE:
            asked.append((("verify", "arms", place), f"arm {arm.value}"))
    for path, what in asked:
        raise InvalidRequest.at(
            "/".join(("#", *map(str, path))),
            f"The {what} needs known noise: name its column in train.columns.noise, or let "
            "plant_noise flip labels.",
        )


def knows_noise(checked: AuditRequest) -> bool:
    """Return whether wrong labels are planted, or named by a column."""
    columns = checked.train.columns
    return checked.plant_noise is not None or bool(columns and columns.noise)
