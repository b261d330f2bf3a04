"""References: how a request names a model or a dataset, parsed strictly and never fetched here."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlencode, urlsplit

MAX_REFERENCE_CHARS = 1024
DEFAULT_REVISION = "main"
DEFAULT_SPLIT = "train"
MODEL_FORMS = "file:///absolute/folder, hf://owner/name@revision or s3://bucket/folder"
DATASET_FORMS = (
    "upload:ds_…, file:///absolute/file, hf://datasets/owner/name@revision?config=…&split=…, "
    "https://host/file or s3://bucket/file"
)

_UPLOAD = re.compile(r"ds_[0-9A-Za-z_-]{1,64}")
# What the hub itself allows: 96 characters, no "--" or "..", no "-" or "." at the ends.
_REPOSITORY_PART = re.compile(r"(?!.*(?:--|\.\.))[0-9A-Za-z_](?:[0-9A-Za-z._-]{0,94}[0-9A-Za-z_])?")
_REVISION = re.compile(r"(?!.*(?://|\.\.))[0-9A-Za-z_](?:[0-9A-Za-z._/-]{0,126}[0-9A-Za-z_-])?")
_CONFIG = re.compile(r"(?!.*\.\.)[0-9A-Za-z_](?:[0-9A-Za-z ._+-]{0,126}[0-9A-Za-z_+-])?")
_SPLIT = re.compile(r"\w{1,64}(?:\.\w{1,64}){0,3}", re.ASCII)
# A name or a number; what it may stand for is looked at when it is called.
_HOST = re.compile(
    r"(?!.*\.\.)[0-9A-Za-z](?:[0-9A-Za-z._-]{0,252}[0-9A-Za-z.])?|\[[0-9A-Fa-f:.]{2,45}\]"
)
_BUCKET = re.compile(r"(?!.*(?:\.\.|\.-|-\.))(?![0-9.]+$)[0-9a-z][0-9a-z.-]{1,61}[0-9a-z]")
_SMALLEST_PORT, _LARGEST_PORT = 1024, 65535
_HTTPS_PORT = 443
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


@dataclass(frozen=True, slots=True)
class WebReference:
    """A file behind an https:// address; it may hold a signature that gives access."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def host(self) -> str:
        """The name or number, without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def name(self) -> str:
        """What the file is called: the last part of the path."""
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class ObjectReference:
    """An object of an S3 store, or all objects of a folder; the operator says which store."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{quote(self.key)}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]


ModelReference = FileReference | HubModelReference | ObjectReference
DatasetReference = (
    UploadReference | FileReference | HubDatasetReference | WebReference | ObjectReference
)
Reference = (
    UploadReference
    | FileReference
    | HubModelReference
    | HubDatasetReference
    | WebReference
    | ObjectReference
)


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
    for prefix, parse in _PARSERS.items():
        if text.startswith(prefix):
            reference = parse(text)
            if len(str(reference)) > MAX_REFERENCE_CHARS:
                raise InvalidReference(
                    f"percent-encoded, the reference has more than {MAX_REFERENCE_CHARS:,} "
                    "characters, the most that are taken"
                )
            return reference
    raise InvalidReference(
        f"{text!r} is not a reference: use {MODEL_FORMS} for a model, {DATASET_FORMS} for a dataset"
    )


def parse_model_reference(text: str) -> ModelReference:
    """Parse a reference that must name a model or an adapter.

    Raises:
        InvalidReference: it has no accepted form, or names a dataset.
    """
    reference = parse_reference(text)
    if isinstance(reference, FileReference | HubModelReference | ObjectReference):
        return reference
    raise InvalidReference(f"{text!r} names a dataset where a model is expected: use {MODEL_FORMS}")


def parse_dataset_reference(text: str) -> DatasetReference:
    """Parse a reference that must name a dataset.

    Raises:
        InvalidReference: it has no accepted form, or names a model.
    """
    reference = parse_reference(text)
    if isinstance(reference, HubModelReference):
        raise InvalidReference(
            f"{text!r} names a model where a dataset is expected: use {DATASET_FORMS}"
        )
    return reference


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


def check_object(reference: ObjectReference, roots: Sequence[str]) -> None:
    """Raise unless an object lies under one of the allowed roots, bucket or bucket/folder.

    Raises:
        InvalidReference: there are no roots, or it lies outside of them.
    """
    if not roots:
        raise InvalidReference(
            f"{reference}: this server reads no object store; its operator allows buckets with "
            "WINNOW_S3_ROOTS"
        )
    where = f"{reference.bucket}/{reference.key}/"
    if not any(where.startswith(f"{root}/") for root in roots):
        raise InvalidReference(
            f"{reference}: it lies outside the buckets and folders that this server may read "
            "(WINNOW_S3_ROOTS)"
        )


def _parse_web(text: str) -> WebReference:
    rest = text.removeprefix("https://")
    authority, slash, _ = rest.partition("/")
    if not text.isascii() or any(letter in text for letter in ' \\"<>^`{|}'):
        raise InvalidReference(f"{text!r} holds a character that must be percent-encoded")
    if "#" in text:
        raise InvalidReference(f"{text!r} has a fragment, which is never sent; leave it out")
    if "@" in authority:
        raise InvalidReference(f"{text!r} carries a user or a password; leave them out")
    host, colon, digits = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, digits = authority, str(_HTTPS_PORT)
    if not _HOST.fullmatch(host):
        raise InvalidReference(f"{text!r} names no host: use https://host/file")
    is_port = digits.isdecimal() and len(digits) <= len("65535")
    port = int(digits) if is_port else 0
    if port != _HTTPS_PORT and not _SMALLEST_PORT <= port <= _LARGEST_PORT:
        raise InvalidReference(f"{text!r}: port {digits} is not called: use 443, or 1024 and up")
    try:
        path = urlsplit(text).path
    except ValueError as error:  # brackets that hold no number
        raise InvalidReference(f"{text!r} names no host: use https://host/file") from error
    if not slash or path.endswith("/"):
        raise InvalidReference(f"{text!r} names no file: use https://host/file")
    _percent_decoded(path, text=text)
    return WebReference(text)


def _parse_object(text: str) -> ObjectReference:
    bucket, slash, raw = text.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidReference(
            f"{text!r} does not name a bucket: 3 to 63 lower-case letters, digits, '-' and '.'"
        )
    if "?" in raw or "#" in raw:
        raise InvalidReference(
            f"{text!r}: write '?' and '#' in a key as %3F and %23; an object takes no options"
        )
    key = _percent_decoded(raw, text=text).removesuffix("/")
    if not slash or any(part in {"", ".", ".."} for part in key.split("/")):
        raise InvalidReference(
            f"{text!r}: the key may not be empty, nor hold '//', '/./' or '/../': use "
            "s3://bucket/folder/file"
        )
    return ObjectReference(bucket, key)


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


_PARSERS: dict[str, Callable[[str], Reference]] = {
    "upload:": _parse_upload,
    "file://": _parse_file,
    "hf://datasets/": _parse_hub_dataset,
    "hf://": _parse_hub_model,
    "https://": _parse_web,
    "s3://": _parse_object,
}
