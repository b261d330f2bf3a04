"""An audit's request, from a file and from options; local files are uploaded."""

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.commands.session import Refused, Session, share

if TYPE_CHECKING:
    from winnow.client import Client
    from winnow.results import Dataset

SETS = ("train", "validation", "test")
_SCHEMES = ("upload:", "file://", "hf://", "https://", "s3://")
_USUAL_NAMES = frozenset({"text", "label", "prompt", "completion", "messages"})
_HASH_BYTES = 1024**2


def read_request(path: Path | None) -> dict[str, Any]:
    """Return the request of a JSON or YAML file; an empty one without a file.

    Raises:
        Refused: it is not such a file, or no object.
        MissingExtra: it is YAML, and pyyaml is not installed.
    """
    if path is None:
        return {}
    text = path.read_text("utf-8")
    try:
        body = _yaml(text) if path.suffix in {".yaml", ".yml"} else json.loads(text)
    except ValueError as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise Refused(f"{path} holds no object: write the fields of POST /v1/audits in it.")
    return body


def _yaml(text: str) -> Any:  # noqa: ANN401  what YAML knows
    if find_spec("yaml") is None:
        from winnow.errors import MissingExtra

        raise MissingExtra("pyyaml", extra="yaml")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def merge(body: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `body` with what `over` says on top, object by object; None says nothing."""
    merged = dict(body)
    for name, value in over.items():
        if isinstance(value, Mapping):
            below = merged.get(name)
            inner = merge(below if isinstance(below, Mapping) else {}, value)
            if inner or below is not None or not value:
                merged[name] = inner
        elif value is not None:
            merged[name] = value
    return merged


def set_fields(assignments: Mapping[str, str]) -> dict[str, Any]:
    """Return an object from dotted fields; values are JSON, or else text."""
    body: dict[str, Any] = {}
    for path, text in assignments.items():
        *parents, last = path.split(".")
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise Refused(f"--set {path}: {parent} is set to a value already.")
        try:
            place[last] = json.loads(text)
        except ValueError:
            place[last] = text
    return body


def flag_of(text: str | None) -> Any:  # noqa: ANN401  as in the request
    """Return `flag` of the request: auto, a share (2% or 0.02) or a number of samples."""
    if text is None or text == "auto":
        return text
    return {"count": int(text)} if text.isdecimal() else {"fraction": share(text)}


def make_local(
    session: Session, client: "Client", body: dict[str, Any], columns: dict[str, str]
) -> dict[str, Any]:
    """Return the request with references in place of local paths; tables are uploaded.

    Args:
        session: says what is uploaded.
        client: uploads.
        body: the request, where a reference may be a path of this machine.
        columns: which columns hold what, in all tables.

    Raises:
        Refused: a path leads nowhere.
    """
    body = dict(body)
    if "model" in body:
        body["model"] = _local_model(body["model"])
    done: dict[tuple[str, str], str] = {}
    for name in SETS:
        source = body.get(name)
        if not isinstance(source, Mapping) or not isinstance(source.get("reference"), str):
            continue
        named = merge(source.get("columns") or {}, columns)
        reference = source["reference"]
        if reference.startswith(_SCHEMES):
            body[name] = merge(source, {"columns": named} if named else {})
            continue
        path = Path(reference).expanduser()
        if not path.is_file():
            raise Refused(
                f"--{name}: there is no file {reference!r}. Name a table (Parquet, JSONL or CSV), "
                "or a reference: upload:…, file:///…, hf://datasets/…, https://…, s3://…"
            )
        content = (_sha256(path), json.dumps(named, sort_keys=True))
        if content not in done:
            done[content] = _uploaded(session, client, path, content[0], named)
        body[name] = {**source, "reference": done[content]}
        body[name].pop("columns", None)  # the upload has them
    return body


def _local_model(model: Any) -> Any:  # noqa: ANN401  the service says what is wrong with others
    if not isinstance(model, Mapping) or not isinstance(model.get("reference"), str):
        return model
    found = dict(model)
    for field in ("reference", "adapter"):
        reference = found.get(field)
        if not isinstance(reference, str) or reference.startswith(_SCHEMES):
            continue
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise Refused(
                f"--model: there is no folder {reference!r}. Name one with a Transformers model, "
                "or a reference: file:///…, hf://owner/name@revision, s3://…"
            )
        found[field] = folder.resolve().as_uri()
    return found


def _uploaded(
    session: Session, client: "Client", path: Path, sha256: str, columns: dict[str, str]
) -> str:
    """Return the reference of a file's upload: of an earlier one, where there is one."""
    from winnow.requests import Columns

    for dataset in client.datasets(sha256=sha256):
        if dataset.sha256 == sha256 and _reads(dataset, columns):
            session.say(f"{path.name} was uploaded before: {dataset.reference}")
            return dataset.reference
    session.say(f"Uploading {path.name} ({path.stat().st_size / 1e6:,.1f} MB) …")
    dataset = client.upload_dataset(path, columns=Columns(**columns) if columns else None)
    session.say(f"{path.name}: {dataset.num_rows:,} rows, {dataset.reference}")
    return dataset.reference


def _reads(dataset: "Dataset", columns: Mapping[str, str]) -> bool:
    """Tell whether a dataset reads the columns that a new upload would read."""
    others = {
        field: name
        for field, name in dataset.columns.items()
        if name is not None and field not in columns
    }
    return all(dataset.columns.get(field) == name for field, name in columns.items()) and all(
        name == field and field in _USUAL_NAMES for field, name in others.items()
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()
