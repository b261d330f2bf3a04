"""What is fuzzed: each takes any bytes, and fails on anything but an answer or a refusal."""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.datasets.columns import ColumnNames, DatasetError, DatasetLimits
from app.datasets.files import guess_format, inspect_dataset, read_dataset
from app.datasets.readers import read_header
from app.datasets.tables import FileFormat
from app.errors import InvalidRequest
from app.pagination import decode_cursor, encode_cursor
from app.references import InvalidReference, parse_reference
from app.settings import Settings
from app.webhooks.addresses import check_url
from workers.sources.configs import (
    clean_adapter_config,
    clean_model_config,
    clean_tokenizer_config,
)
from workers.sources.errors import SourceError

LIMITS = DatasetLimits(
    max_rows=100, max_bytes=10_000, max_text_chars=200, max_columns=20, max_line_bytes=2_000
)
COLUMNS = (
    ColumnNames(),
    ColumnNames(prompt="text", completion="label"),
    ColumnNames(messages="text"),
)
_SETTINGS = Settings()
# in memory where there is such a folder: a file is written at every turn
_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def reference(data: bytes) -> None:
    """A reference can be written out and read again."""
    text = data.decode("utf-8", "replace")
    try:
        parsed = parse_reference(text)
    except InvalidReference:
        return
    assert parse_reference(str(parsed)) == parsed


def cursor(data: bytes) -> None:
    """A cursor that is taken stands for one key."""
    text = data.decode("latin-1")
    with suppress(InvalidRequest):
        number = decode_cursor(text, int)
        assert decode_cursor(encode_cursor(number), int) == number
    with suppress(InvalidRequest):
        name = decode_cursor(text, str)
        assert decode_cursor(encode_cursor(name), str) == name


def address(data: bytes) -> None:
    """A webhook's address is taken or refused; nothing is looked up."""
    try:
        check_url(_SETTINGS, data.decode("utf-8", "replace"))
    except InvalidRequest:
        return


def config(data: bytes) -> None:
    """A config keeps no key that could run code."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return
    for clean in (clean_model_config, clean_tokenizer_config, clean_adapter_config):
        try:
            cleaned = clean(found)
        except SourceError:
            continue
        assert not _names(cleaned) & {"auto_map", "trust_remote_code", "attn_implementation"}


def _names(value: object) -> set[str]:
    """Return the keys of all objects in JSON."""
    if isinstance(value, list):
        return set().union(*map(_names, value))
    if isinstance(value, dict):
        return set(value).union(*map(_names, value.values()))
    return set()


def _table(data: bytes, file_format: FileFormat) -> None:
    with tempfile.NamedTemporaryFile(dir=_FOLDER, suffix=f".{file_format}") as file:
        path = Path(file.name)
        path.write_bytes(data)
        try:
            guess_format(path.name, data[:512])
            read_header(path, format=file_format, limits=LIMITS)
        except DatasetError:
            pass
        for columns in COLUMNS:
            options = {"format": file_format, "columns": columns, "limits": LIMITS}
            try:
                summary = inspect_dataset(path, **options)  # type: ignore[arg-type]
                num_rows = sum(batch.num_rows for batch in read_dataset(path, **options))  # type: ignore[arg-type]
            except DatasetError:
                continue
            assert summary.num_rows == num_rows <= LIMITS.max_rows


def csv(data: bytes) -> None:
    """A CSV file is read or refused."""
    _table(data, "csv")


def jsonl(data: bytes) -> None:
    """A JSONL file is read or refused."""
    _table(data, "jsonl")


def parquet(data: bytes) -> None:
    """A Parquet file is read or refused."""
    _table(data, "parquet")


TARGETS: dict[str, Callable[[bytes], None]] = {
    of.__name__: of for of in (reference, cursor, address, config, csv, jsonl, parquet)
}
