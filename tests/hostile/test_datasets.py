"""Table files that were made to do harm: refused with a reason, in bounded memory and time."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from tests.app.conftest import api, client, new_client
from tests.hostile import parquet_bytes
from tests.hostile.isolated import MEBIBYTE, Isolated

__all__ = ["api", "client", "new_client"]

MOST_MIB = 700
Build = Callable[[Path], object]


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated("tests.hostile.dataset_jobs") as running:
        yield running


def content(data: bytes) -> Build:
    return lambda path: path.write_bytes(data)


def made(make: Callable[[int], bytes], size: int) -> Build:
    """Bytes that are made when they are needed."""
    return lambda path: path.write_bytes(make(size))


def lines(*rows: str) -> Build:
    return content("".join(f"{row}\n" for row in rows).encode())


def table(**columns: Any) -> Build:
    return lambda path: pq.write_table(pa.table(columns), path)


def sparse(start: bytes, num_bytes: int) -> Build:
    """A file of so many bytes, nearly all of them NUL, that takes no room on the disk."""

    def build(path: Path) -> None:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(num_bytes)

    return build


def repeated(start: str, line: str, times: int) -> Build:
    def build(path: Path) -> None:
        with path.open("w") as file:
            file.write(start)
            for _ in range(times):
                file.write(line)

    return build


def many_columns(number: int) -> Build:
    def build(path: Path) -> None:
        names = [f"column_{place}" for place in range(number)]
        pq.write_table(pa.table({name: pa.array([1], pa.int8()) for name in names}), path)

    return build


def unfolding(path: Path) -> None:
    """Two million rows of a text of 100,000 characters: 200 GB in some kilobytes."""
    parquet_bytes.unfolding(path, num_rows=2_000_000, num_chars=100_000)


def footer_of(length: int) -> bytes:
    return b"PAR1" + bytes(100) + struct.pack("<I", length) + b"PAR1"


def _renamed(path: Path) -> bytes:
    """Return a table whose column is called by bytes that are no text."""
    table(name_of_mine=["a"], label=["b"])(path)
    return path.read_bytes().replace(b"name_of_mine", b"name_of_\xff\xfe\xfd\xfc")


def huge_footer(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.truncate(900_000_004)
        file.seek(0, 2)
        file.write(struct.pack("<I", 900_000_000) + b"PAR1")


LONG = "y" * (15 * MEBIBYTE)
CASES: dict[str, tuple[str, Build, str, str]] = {
    # Parquet that unfolds, lies or breaks off
    "page_bomb.parquet": (
        "parquet",
        made(parquet_bytes.page_bomb, 2**28),
        "unreadable_file",
        "unfolds to 268,435,460 bytes",
    ),
    "unfolding": ("parquet", unfolding, "too_large", "more than 2,147,483,648 bytes"),
    "nested deeply": (
        "parquet",
        made(parquet_bytes.deeply_nested, 20_000),
        "unreadable_file",
        "nested",
    ),
    "only magic": ("parquet", content(b"PAR1PAR1"), "unreadable_file", "too short"),
    "cut off": ("parquet", content(b"PAR1" + bytes(1000)), "unreadable_file", "cut off"),
    "footer beyond the file": (
        "parquet",
        content(footer_of(2**32 - 1)),
        "unreadable_file",
        "footer has 4,294,967,295 bytes",
    ),
    "footer of nothing": ("parquet", content(footer_of(0)), "unreadable_file", "Parquet"),
    "footer of NULs": ("parquet", content(footer_of(100)), "unreadable_file", "Parquet"),
    "footer of a gigabyte": (
        "parquet",
        huge_footer,
        "unreadable_file",
        "footer has 900,000,000 bytes",
    ),
    "a name that is not UTF-8": (
        "parquet",
        lambda path: content(_renamed(path))(path),
        "unreadable_file",
        "utf-8",
    ),
    "encrypted": ("parquet", content(b"PARE" + bytes(50) + b"PARE"), "unknown_format", "Parquet"),
    "100,000 columns": ("parquet", many_columns(100_000), "unreadable_file", "its footer has"),
    "20,000 columns": ("parquet", many_columns(20_000), "too_many_columns", "at most 1,000"),
    "nested types": (
        "parquet",
        table(text=[[["a"]], [["b"]]], label=["a", "b"]),
        "wrong_type",
        "holds list",
    ),
    "maps": (
        "parquet",
        table(text=pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), label=["a"]),
        "wrong_type",
        "holds map",
    ),
    "nulls": ("parquet", table(text=["a", None], label=["a", "b"]), "empty_value", "row 2"),
    "nothing but nulls": (
        "parquet",
        table(text=pa.nulls(3), label=pa.nulls(3)),
        "empty_value",
        "row 1",
    ),
    # lines without end
    "a line of a gigabyte.csv": ("csv", sparse(b"text,label\n", 2**30), "text_too_long", "line 2"),
    "a line of a gigabyte.jsonl": ("jsonl", sparse(b'{"text":"', 2**30), "text_too_long", "line 1"),
    "a header of a gigabyte": ("csv", sparse(b"text,", 2**30), "text_too_long", "line 1"),
    "rows of long lines": (
        "jsonl",
        repeated("", json.dumps({"text": "a", "label": "b", "more": LONG}) + "\n", 30),
        "too_few_labels",
        "only the label",
    ),
    "rows of many values": (
        "jsonl",
        repeated("", '{"text":"a","label":"b","more":[' + "[]," * 2_000_000 + "1]}\n", 3),
        "too_few_labels",
        "only the label",
    ),
    "a row of long cells": (
        "csv",
        repeated('text,label\n"', "y" * MEBIBYTE + '\n","', 40),
        "malformed_row",
        "more than 16,777,216 characters",
    ),
    "a quote that never ends": (
        "csv",
        repeated('text,label\n"', "a,b\n", 8_000_000),
        "malformed_row",
        "line 2 is not valid CSV",
    ),
    # columns, nesting, numbers, keys
    "100,000 columns.csv": (
        "csv",
        lines(",".join(f"c{number}" for number in range(100_000))),
        "too_many_columns",
        "at most 1,000",
    ),
    "100,000 columns.jsonl": (
        "jsonl",
        lines(json.dumps({f"c{number}": 1 for number in range(100_000)})),
        "too_many_columns",
        "at most 1,000",
    ),
    "new columns in every row": (
        "jsonl",
        lines(*(json.dumps({f"c{row}_{n}": 1 for n in range(900)}) for row in range(50))),
        "too_many_columns",
        "at most 1,000",
    ),
    "objects in objects": (
        "jsonl",
        lines('{"text":' * 100_000 + "1" + "}" * 100_000),
        "malformed_row",
        "line 1",
    ),
    "lists in lists": ("jsonl", lines('{"text":' + "[" * 1_000_000), "malformed_row", "line 1"),
    "a number of a million digits": (
        "jsonl",
        lines('{"text":"a","label":' + "9" * 1_000_000 + "}"),
        "malformed_row",
        "number is infinity",
    ),
    "a number of 30 digits": (
        "jsonl",
        lines('{"text":"a","label":' + "9" * 30 + "}"),
        "wrong_type",
        "not a whole number",
    ),
    "not a number": ("jsonl", lines('{"text":"a","label":NaN}'), "malformed_row", "line 1"),
    "two columns of one name": (
        "csv",
        lines("text,text,label", "a,b,c"),
        "missing_column",
        "2 col",
    ),
    # encodings
    "UTF-16": (
        "csv",
        content("text,label\na,b\n".encode("utf-16")),
        "bad_encoding",
        "save the file as UTF-8",
    ),
    "Latin-1 after a while": (
        "csv",
        content(b"text,label\n" + b"good,a\n" * 5000 + b"sch\xf6n,b\n"),
        "bad_encoding",
        "line 5,002",
    ),
    "half a surrogate": (
        "jsonl",
        lines('{"text":"\\ud800","label":"a"}'),
        "malformed_row",
        "line 1",
    ),
    "an overlong form": ("jsonl", content(b'{"text":"\xc0\xaf"}\n'), "bad_encoding", "line 1"),
    "NULs.csv": ("csv", content(b"text,label\na\x00b,c\nd,e\n"), "bad_text", "row 1"),
    "NULs.jsonl": ("jsonl", lines('{"text":"\\u0000","label":"a"}'), "bad_text", "row 1"),
    # other things by the name of a table
    "an archive": ("csv", content(b"PK\x03\x04" + bytes(100)), "unknown_format", "archive"),
    "gzip": ("jsonl", content(b"\x1f\x8b\x08" + bytes(100)), "unknown_format", "compressed"),
    "zstd": ("jsonl", content(b"\x28\xb5\x2f\xfd" + bytes(100)), "unknown_format", "compressed"),
    "a pickle": ("jsonl", content(b"\x80\x04\x95" + bytes(100)), "bad_encoding", "line 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_a_reason_in_bounded_memory(
    isolated: Isolated, tmp_path: Path, name: str
) -> None:
    suffix, build, code, message = CASES[name]
    path = tmp_path / f"data.{suffix}"
    build(path)
    answer = isolated.run("inspect", path=str(path))
    assert answer.get("code") == code, answer
    assert message in answer["message"]
    assert answer["peak"] <= MOST_MIB
    path.unlink()


def test_what_looks_odd_and_is_not_is_taken(isolated: Isolated, tmp_path: Path) -> None:
    """Formulas are texts, the last of equal keys counts, and a mark of the byte order is none."""
    path = tmp_path / "data.jsonl"
    rows = ['{"text":"=cmd()","label":"a"}', '{"text":"x","text":"@SUM(A1)","label":"b"}']
    path.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    answer = isolated.run("inspect", path=str(path))
    assert (answer["code"], answer["num_rows"]) == (None, 2)


@pytest.mark.parametrize(
    "name",
    ["only magic", "nested types", "nulls", "UTF-16", "NULs.jsonl", "lists in lists", "gzip"],
)
def test_an_upload_of_it_is_a_problem_that_says_what_to_change(
    client: TestClient, tmp_path: Path, name: str
) -> None:
    suffix, build, code, message = CASES[name]
    path = tmp_path / f"data.{suffix}"
    build(path)
    answer = client.post("/v1/datasets", files={"file": (path.name, path.read_bytes())})
    assert answer.status_code == 422
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["code"] == code
    assert message in problem["detail"]
    assert problem["errors"][0]["pointer"].startswith("#/")
    assert client.get("/v1/datasets").json()["data"] == []
