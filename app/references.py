"""References: how a request names a model or a dataset, parsed strictly and never fetched here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlencode

MAX_REFERENCE_CHARS = 1024
DEFAULT_REVISION = "main"
DEFAULT_SPLIT = "train"
MODEL_FORMS = "file:///absolute/folder or hf://owner/name@revision"
DATASET_FORMS = (
    "upload:ds_…, file:///absolute/file or hf://datasets/owner/name@revision?config=…&split=…"
)

_UPLOAD = re.compile(r"ds_[0-9A-Za-z_-]{1,64}")
# What the hub itself allows: 96 characters, no "--" or "..", no "-" or "." at the ends.
_REPOSITORY_PART = re.compile(r"(?!.*(?:--|\.\.))[0-9A-Za-z_](?:[0-9A-Za-z._-]{0,94}[0-9A-Za-z_])?")
_REVISION = re.compile(r"(?!.*(?://|\.\.))[0-9A-Za-z_](?:[0-9A-Za-z._/-]{0,126}[0-9A-Za-z_-])?")
_CONFIG = re.compile(r"(?!.*\.\.)[0-9A-Za-z_](?:[0-9A-Za-z ._+-]{0,126}[0-9A-Za-z_+-])?")
_SPLIT = re.compile(r"\w{1,64}(?:\.\w{1,64}){0,3}", re.ASCII)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


class InvalidReference(ValueError):
    """A reference that cannot be used; the message says why and what forms there are."""


@dataclass(frozen=True, slots=True)
class UploadReference:
    """A dataset that was uploaded to this service."""

    id: str

    def __str__(self) -> str:
        return f"upload:{self.id}"


@dataclass(frozen=True, slots=True)
class FileReference:
    """A file or folder on the server, allowed only under the configured roots."""

    path: Path

    def __str__(self) -> str:
        return f"file://{quote(str(self.path))}"


@dataclass(frozen=True, slots=True)
class HubModelReference:
    """A model repository of the hub; `repo` is owner/name."""

    repo: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class HubDatasetReference:
    """One split of one configuration of a dataset repository; `repo` is owner/name."""

    repo: str
    revision: str = DEFAULT_REVISION
    config: str | None = None
    split: str = DEFAULT_SPLIT

    def __str__(self) -> str:
        options = {"config": self.config, "split": self.split}
        query = urlencode({key: value for key, value in options.items() if value is not None})
        return f"hf://datasets/{self.repo}@{self.revision}?{query}"


ModelReference = FileReference | HubModelReference
DatasetReference = UploadReference | FileReference | HubDatasetReference
Reference = UploadReference | FileReference | HubModelReference | HubDatasetReference


def parse_reference(text: str) -> Reference:
    """Parse a reference to a model or a dataset.

    Raises:
        InvalidReference: `text` has none of the accepted forms.
    """
    if len(text) > MAX_REFERENCE_CHARS:
        raise InvalidReference(
            f"the reference has {len(text):,} characters; at most {MAX_REFERENCE_CHARS:,} are taken"
        )
    if not text.isprintable():
        raise InvalidReference("the reference holds a control or other unprintable character")
    if text.startswith("upload:"):
        return _parse_upload(text)
    if text.startswith("file://"):
        return _parse_file(text)
    if text.startswith("hf://datasets/"):
        return _parse_hub_dataset(text)
    if text.startswith("hf://"):
        return _parse_hub_model(text)
    raise InvalidReference(
        f"{text!r} is not a reference: use {MODEL_FORMS} for a model, {DATASET_FORMS} for a dataset"
    )


def parse_model_reference(text: str) -> ModelReference:
    """Parse a reference that must name a model or an adapter.

    Raises:
        InvalidReference: it has no accepted form, or names a dataset.
    """
    reference = parse_reference(text)
    if isinstance(reference, FileReference | HubModelReference):
        return reference
    raise InvalidReference(f"{text!r} names a dataset where a model is expected: use {MODEL_FORMS}")


def parse_dataset_reference(text: str) -> DatasetReference:
    """Parse a reference that must name a dataset.

    Raises:
        InvalidReference: it has no accepted form, or names a model.
    """
    reference = parse_reference(text)
    if isinstance(reference, UploadReference | FileReference | HubDatasetReference):
        return reference
    raise InvalidReference(
        f"{text!r} names a model where a dataset is expected: use {DATASET_FORMS}"
    )


def resolve_file(path: Path, roots: Sequence[Path]) -> Path:
    """Return the real path of something that exists under one of the allowed roots.

    Whether a path outside the roots exists is never told.

    Args:
        path: absolute; symbolic links are followed before the check, so none can lead out.
        roots: the folders that may be read, resolved likewise.

    Raises:
        InvalidReference: there are no roots, `path` leads out of them, or nothing is there.
    """
    if not roots:
        raise InvalidReference(
            f"{path}: this server reads no local files; its operator allows folders with "
            "WINNOW_FILE_ROOTS"
        )
    if not path.is_absolute():
        raise InvalidReference(f"{path}: the path is not absolute")
    try:
        resolved = path.resolve()
        allowed = any(resolved.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL
        raise InvalidReference(f"{path}: the path cannot be resolved") from error
    if not allowed:
        raise InvalidReference(
            f"{path}: the path leads outside the folders that this server may read "
            "(WINNOW_FILE_ROOTS)"
        )
    try:
        resolved.stat()
    except OSError as error:
        raise InvalidReference(f"{path}: there is no such file or folder") from error
    return resolved


def _parse_upload(text: str) -> UploadReference:
    identifier = text.removeprefix("upload:")
    if not _UPLOAD.fullmatch(identifier):
        raise InvalidReference(
            f"{text!r} does not name an upload: use upload:ds_… with the id that "
            "POST /v1/datasets answered"
        )
    return UploadReference(identifier)


def _parse_file(text: str) -> FileReference:
    raw = text.removeprefix("file://")
    if not raw.startswith("/"):
        raise InvalidReference(
            f"{text!r}: the path must be absolute and on this server, as in file:///data/train.csv"
        )
    if "?" in raw or "#" in raw:
        raise InvalidReference(
            f"{text!r}: write '?' and '#' in a path as %3F and %23; a file takes no options"
        )
    path = _percent_decoded(raw, text=text)
    segments = path.removeprefix("/").removesuffix("/").split("/")
    if any(segment in {"", ".", ".."} for segment in segments):
        raise InvalidReference(f"{text!r}: the path may not hold '//', '/./' or '/../'")
    return FileReference(Path("/", *segments))


def _parse_hub_model(text: str) -> HubModelReference:
    body = text.removeprefix("hf://")
    if "?" in body or "#" in body:
        raise InvalidReference(f"{text!r}: a model takes no options; use hf://owner/name@revision")
    repo, revision = _parse_repository(body, text=text, form="hf://owner/name@revision")
    return HubModelReference(repo, revision)


def _parse_hub_dataset(text: str) -> HubDatasetReference:
    form = "hf://datasets/owner/name@revision?config=…&split=…"
    body, has_query, query = text.removeprefix("hf://datasets/").partition("?")
    repo, revision = _parse_repository(body, text=text, form=form)
    options = _parse_options(query, text=text) if has_query else {}
    config = options.get("config")
    if config is not None and not _CONFIG.fullmatch(config):
        raise InvalidReference(f"{text!r}: {config!r} is not a configuration's name; use {form}")
    split = options.get("split", DEFAULT_SPLIT)
    if not _SPLIT.fullmatch(split):
        raise InvalidReference(
            f"{text!r}: {split!r} is not a split's name, such as train or validation; "
            "slices are not taken"
        )
    return HubDatasetReference(repo, revision, config, split)


def _parse_repository(body: str, *, text: str, form: str) -> tuple[str, str]:
    """Split owner/name@revision into (owner/name, revision)."""
    repo, has_revision, revision = body.partition("@")
    owner, slash, name = repo.partition("/")
    names_are_valid = all(_REPOSITORY_PART.fullmatch(part) for part in (owner, name))
    if not slash or not names_are_valid or name.endswith(".git"):
        raise InvalidReference(f"{text!r} does not name a repository as owner/name: use {form}")
    if not has_revision:
        return repo, DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):
        raise InvalidReference(
            f"{text!r}: {revision!r} is not a branch, tag or commit; use {form}, or leave "
            f"'@revision' out for {DEFAULT_REVISION}"
        )
    return repo, revision


def _parse_options(query: str, *, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        if key not in {"config", "split"}:
            raise InvalidReference(
                f"{text!r}: {key!r} is not an option; a dataset takes config and split"
            )
        if key in options:
            raise InvalidReference(f"{text!r}: {key} is given twice")
        options[key] = _percent_decoded(value.replace("+", " "), text=text)
    return options


def _percent_decoded(value: str, *, text: str) -> str:
    if _BAD_PERCENT.search(value):
        raise InvalidReference(f"{text!r}: a '%' must be followed by two hexadecimal digits")
    try:
        decoded = unquote(value, errors="strict")
    except UnicodeDecodeError as error:
        raise InvalidReference(f"{text!r}: the percent-encoded bytes are not UTF-8") from error
    if not decoded.isprintable():
        raise InvalidReference(f"{text!r}: it encodes a control or other unprintable character")
    return decoded
