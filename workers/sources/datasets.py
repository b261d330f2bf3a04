"""Resolve a reference to a dataset to one local table file.

A dataset of the hub is pinned to a commit; the `datasets` library tells from the repository's card
and file names which files make up the split; these alone are downloaded, and written as one Parquet
file. Only tables are taken: no scripts (the library has none any more), no archives, no media.
"""

import errno
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import DatasetBuilder, load_dataset_builder
from datasets.data_files import DataFilesDict
from datasets.exceptions import DatasetsError
from huggingface_hub import DatasetCard

from app.datasets.files import DatasetLimits
from app.datasets.storage import hub_table_path
from app.references import (
    DatasetReference,
    FileReference,
    HubDatasetReference,
    ObjectReference,
    UploadReference,
    WebReference,
)
from workers.sources.errors import SourceError, SourceErrorCode
from workers.sources.hub import Hub, HubFile
from workers.sources.local import ResolvedDataset, resolve_local
from workers.sources.objects import NO_STORE, ObjectStore
from workers.sources.web import NO_WEB, Web

_CARD = "README.md"
_TABLE_SUFFIXES = {".parquet", ".csv", ".jsonl", ".ndjson", ".json"}
_BUILDERS = {"parquet", "csv", "json"}
_BATCH_ROWS = 4096


def resolve_dataset(
    reference: DatasetReference,
    *,
    find_upload: Callable[[str], ResolvedDataset],
    roots: Sequence[Path],
    hub: Hub,
    cache_dir: Path,
    limits: DatasetLimits,
    max_bytes: int,
    web: Web = NO_WEB,
    store: ObjectStore = NO_STORE,
) -> ResolvedDataset:
    """Return the dataset as a local Parquet, JSONL or CSV file.

    A hub reference whose revision is a full commit and that was resolved before is answered
    without asking the hub.

    Args:
        reference: an upload, a file, a split of a hub repository, or a file somewhere else.
        find_upload: looks up an upload by its id; what it raises passes through.
        roots: folders that file:// references may name.
        hub: where hf:// references are resolved.
        cache_dir: where the Parquet files of hub datasets are kept.
        limits: only the number of rows is looked at here.
        max_bytes: of the dataset, compressed or not.
        web: where https:// references are fetched.
        store: where s3:// references are.

    Raises:
        SourceError: what is wrong with the reference, and what to change.
    """
    if isinstance(reference, UploadReference):
        return find_upload(reference.id)
    if isinstance(reference, FileReference):
        return resolve_local(reference, roots=roots, max_bytes=max_bytes)
    if isinstance(reference, WebReference):
        return web.fetch(reference, cache_dir=cache_dir, max_bytes=max_bytes)
    if isinstance(reference, ObjectReference):
        return store.fetch(reference, cache_dir=cache_dir, max_bytes=max_bytes)
    revision = hub.commit(reference, field="dataset")
    pinned = replace(reference, revision=revision)
    target = hub_table_path(cache_dir, pinned)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix="staging-", suffix=".partial"
        ) as temporary:
            table = Path(temporary) / "table.parquet"
            builder = _prepare_builder(
                pinned, hub=hub, folder=Path(temporary) / "data", max_bytes=max_bytes
            )
            _write_split(builder, pinned, table, limits=limits, max_bytes=max_bytes)
            table.replace(target)
    return ResolvedDataset(path=target, format="parquet", revision=revision)


def _prepare_builder(
    reference: HubDatasetReference, *, hub: Hub, folder: Path, max_bytes: int
) -> DatasetBuilder:
    """Return a builder of the split alone, its files downloaded.

    The library resolves configurations and splits on a copy of the repository's tree in which the
    tables are still empty, so that nothing is downloaded but what the split needs.
    """
    commit = reference.revision
    files = {
        file.path: file
        for file in hub.files(reference, commit=commit, recursive=True, field="dataset")
    }
    tables = [file for file in files.values() if _is_table(file)]
    if not tables:
        raise _refusal(
            f"{reference} holds no Parquet, CSV or JSON Lines files; convert it to Parquet",
            "unsupported_dataset",
        )
    folder.mkdir()
    if _CARD in files:
        card = hub.download(reference, commit=commit, paths=[_CARD], field="dataset")[_CARD]
        _check_card(card, reference=reference)
        (folder / _CARD).symlink_to(card.resolve())
    for table in tables:
        placeholder = folder / table.path
        placeholder.parent.mkdir(parents=True, exist_ok=True)
        placeholder.touch()

    with _library_errors(reference):
        builder = load_dataset_builder(
            str(folder), reference.config, cache_dir=str(folder.parent / "library")
        )
    of_split: dict[str, list[str]] = {
        str(split): paths for split, paths in (builder.config.data_files or {}).items()
    }
    if reference.split not in of_split:
        raise _refusal(
            f"{reference} has no split {reference.split!r}; there are: {', '.join(of_split)}",
            "not_found",
        )
    if builder.name not in _BUILDERS:
        raise _refusal(
            f"{reference} is read as {builder.name}; only Parquet, CSV and JSON Lines are taken",
            "unsupported_dataset",
        )
    paths = [
        PurePosixPath(path).relative_to(folder.resolve()).as_posix()
        for path in of_split[reference.split]
    ]
    _check_size(
        sum(files[path].num_bytes for path in paths), source=str(reference), max_bytes=max_bytes
    )
    downloaded = hub.download(reference, commit=commit, paths=paths, field="dataset")
    for path, where in downloaded.items():
        (folder / path).unlink()
        (folder / path).symlink_to(where.resolve())
    builder.config.data_files = DataFilesDict({reference.split: of_split[reference.split]})
    return builder


def _is_table(file: HubFile) -> bool:
    path = PurePosixPath(file.path)
    return (
        path.suffix in _TABLE_SUFFIXES
        and not path.is_absolute()
        and ".." not in path.parts
        and path.as_posix() == file.path
    )


def _check_card(card: Path, *, reference: HubDatasetReference) -> None:
    """Refuse a card whose configurations reach out of the repository, before they are followed."""
    with _library_errors(reference):
        configs = DatasetCard.load(card).data.to_dict().get("configs")
        for pattern in _strings(configs, below={"data_files", "data_dir", "path"}):
            parts = PurePosixPath(pattern).parts
            if pattern.startswith(("/", "~")) or ".." in parts or ":" in pattern:
                raise _refusal(
                    f"{reference}: its card names the files {pattern!r}, which lie outside the "
                    "repository",
                    "unsafe_file",
                )


def _strings(value: Any, *, below: set[str], is_below: bool = False) -> Iterator[str]:  # noqa: ANN401
    """Yield the strings in a YAML value that stand below one of the keys."""
    if isinstance(value, str) and is_below:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, below=below, is_below=is_below)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, below=below, is_below=is_below or key in below)


def _write_split(
    builder: DatasetBuilder,
    reference: HubDatasetReference,
    target: Path,
    *,
    limits: DatasetLimits,
    max_bytes: int,
) -> None:
    writer: pq.ParquetWriter | None = None
    num_rows = num_bytes = 0
    try:
        with _library_errors(reference):
            split = builder.as_streaming_dataset(reference.split).with_format("arrow")
            for table in split.iter(batch_size=_BATCH_ROWS):
                num_rows += table.num_rows
                num_bytes += table.nbytes
                if num_rows > limits.max_rows:
                    raise _refusal(
                        f"{reference} has more than {limits.max_rows:,} rows, the most this server "
                        "takes",
                        "too_large",
                    )
                _check_size(num_bytes, source=str(reference), max_bytes=max_bytes)
                if writer is None:
                    writer = pq.ParquetWriter(target, table.schema, compression="zstd")
                # A later chunk of CSV or JSON may have been guessed to hold other types.
                writer.write_table(table.select(writer.schema.names).cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise _refusal(f"{reference} has no rows", "unsupported_dataset")


@contextmanager
def _library_errors(reference: HubDatasetReference) -> Iterator[None]:
    """Turn what the `datasets` library and its readers raise into a sentence."""
    try:
        yield
    except (
        DatasetsError,
        pa.ArrowException,
        yaml.YAMLError,
        AttributeError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the operator's matter, not the reference's
        raise _refusal(
            f"{reference} cannot be read as a table: {error}", "unsupported_dataset"
        ) from error


def _check_size(num_bytes: int, *, source: str, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise _refusal(
            f"{source} has {num_bytes:,} bytes or more; this server takes at most {max_bytes:,}",
            "too_large",
        )


def _refusal(message: str, code: SourceErrorCode) -> SourceError:
    return SourceError(message, code=code, field="dataset")
