"""Tables that are refused: the stable code, and the sentence that says where and what to change."""

from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.datasets.columns import NUL
from app.datasets.files import DatasetError, DatasetErrorCode, FileFormat
from tests.app.tables import FORMATS, LIMITS, encode, inspect, parquet, write


def jsonl(*lines: str) -> tuple[FileFormat, bytes]:
    return "jsonl", "".join(f"{line}\n" for line in lines).encode()


def table(**columns: Any) -> tuple[FileFormat, bytes]:
    defaults = {"text": ["a", "b"], "label": [0, 1]}
    return "parquet", parquet(pa.table(defaults | columns))


def rows(*texts: str) -> tuple[FileFormat, bytes]:
    return "csv", ("text,label\n" + "".join(f"{text}\n" for text in texts)).encode()


def not_utf8() -> pa.Array:
    buffers = pa.array([b"ok", b"\xff\xfe"]).buffers()
    return pa.Array.from_buffers(pa.string(), 2, buffers)


FULL_TEXT = "x" * 101
DEEP = '{"text":' * 2000
REFUSALS: list[tuple[tuple[FileFormat, bytes], DatasetErrorCode, str]] = [
    (("parquet", b""), "unreadable_file", "not a readable Parquet file"),
    (("parquet", b"PAR1 and then nothing PAR1"), "unreadable_file", "not a readable Parquet"),
    (table(text=[1, 2]), "wrong_type", "column 'text' holds int64 values; texts must be strings"),
    (table(text=[b"a", b"b"]), "wrong_type", "holds binary values"),
    (table(text=[["a"], ["b"]]), "wrong_type", "holds list<.*> values"),
    (table(label=[{"a": 1}, {"a": 2}]), "wrong_type", "holds struct<.*> values"),
    (table(text=["a", None]), "empty_value", "row 2: column 'text' is empty"),
    (table(text=["a", " \t"]), "empty_value", "row 2: column 'text' is empty"),
    (table(text=pa.nulls(2)), "empty_value", "row 1: column 'text' is empty"),
    (table(text=["a", FULL_TEXT]), "text_too_long", "row 2: .*more than 100 characters"),
    (table(text=["a", f"b{NUL}"]), "bad_text", "row 2: column 'text' holds a NUL"),
    (table(text=not_utf8()), "bad_encoding", "row 2: column 'text' is not valid UTF-8"),
    (table(label=["a", "b" * 21]), "text_too_long", "row 2: column 'label' .*20 characters"),
    (table(label=[0.0, 1.5]), "wrong_type", "row 2: column 'label' is not a whole number"),
    (table(label=[0.0, float("nan")]), "wrong_type", "row 2: column 'label' is not a whole"),
    (table(label=[0, None]), "empty_value", "row 2: column 'label' is empty"),
    (table(label=["a", ""]), "empty_value", "row 2: column 'label' is empty"),
    (table(label=pa.nulls(2)), "empty_value", "row 1: column 'label' is empty"),
    (table(label=pa.array([0, 2**64 - 1], pa.uint64())), "wrong_type", "more than 64 bits"),
    (table(label=pa.array([0, 1], pa.date32())), "wrong_type", "holds date32"),
    (table(label=[0, 0]), "too_few_labels", "only the label 0; at least 2"),
    (
        table(text=["a"] * 60, label=list(range(60))),
        "too_many_labels",
        "more than 50 distinct labels; is it the right column",
    ),
    (table(text=[], label=[]), "no_rows", "no rows"),
    (
        table(text=["x" * 100] * 2001, label=[0, 1, *[0] * 1999]),
        "too_large",
        "row 2,001: .*more than 200,000 bytes",
    ),
    (table(text=["a"] * 3001, label=[0] * 3001), "too_many_rows", "3,001 rows"),
    (table(**{f"c{i}": [1, 2] for i in range(9)}), "too_many_columns", "11 columns"),
    (("parquet", parquet(pa.table({"x": [1]}))), "missing_column", "no column 'text'.*has: 'x'"),
    (
        (
            "parquet",
            parquet(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])),
        ),
        "missing_column",
        "2 columns named 'text'",
    ),
    (jsonl(), "no_rows", "no rows"),
    (jsonl('{"text": "a"}'), "missing_column", "no column 'label' for the label.*has: 'text'"),
    (jsonl('{"text": "a", "label": 0}', "{"), "malformed_row", "line 2 is not valid JSON"),
    (jsonl("", "[1]"), "malformed_row", "line 2 is a JSON array"),
    (jsonl(DEEP), "text_too_long", "line 1 has more than 1,000 bytes"),
    (
        jsonl('{"text": 5, "label": 0}'),
        "wrong_type",
        "row 1: column 'text' is a JSON number; it must be a string",
    ),
    (jsonl('{"text": "a", "label": [0]}'), "wrong_type", "row 1: column 'label' is a JSON array"),
    (
        jsonl('{"text": "a", "label": 0}', '{"text": "b", "label": "1"}'),
        "mixed_labels",
        "row 2: column 'label' is a string, in the rows before a number",
    ),
    (
        jsonl('{"text": "a", "label": 0}', '{"text": "b"}', '{"text": "b", "label": "1"}'),
        "mixed_labels",
        "row 3",
    ),
    (jsonl('{"text": "a", "label": 0}', '{"text": "b"}'), "empty_value", "row 2: column 'label'"),
    (jsonl('{"text": "a", "label": 123456789012345678901}'), "wrong_type", "not a whole number"),
    (jsonl('{"text": "a", "label": 18446744073709551615}'), "wrong_type", "64 bits"),
    (("jsonl", b'{"text": "\xff", "label": 0}\n'), "bad_encoding", "line 1 is not valid UTF-8"),
    (("csv", b""), "no_rows", "no rows"),
    (rows(), "no_rows", "no rows"),
    (rows("a,0", "b"), "malformed_row", "line 3 has 1 fields where the header has 2"),
    (rows('"a\nb",0', "c,1,2"), "malformed_row", "line 4 has 3 fields"),
    (rows('"a,0'), "malformed_row", "line 2 is not valid CSV"),
    (rows("a,0", ",1"), "empty_value", "row 2: column 'text' is empty"),
    (rows("a,0", "b,"), "empty_value", "row 2: column 'label' is empty"),
    (("csv", b"text,label\na\xff,0\n"), "bad_encoding", "line 2 is not valid UTF-8 .byte 2."),
    (("csv", b"text,label\n" + b"x" * 1001), "text_too_long", "line 2 has more than 1,000 bytes"),
    (("csv", b"text;label\na;0\n"), "missing_column", "has: 'text;label'"),
    (rows(*["a,0"] * 3001), "too_many_rows", "more than 3,000 rows"),
]


@pytest.mark.parametrize(("content", "code", "message"), REFUSALS)
def test_refusals(
    tmp_path: Path, content: tuple[FileFormat, bytes], code: str, message: str
) -> None:
    form, data = content
    with pytest.raises(DatasetError, match=message) as caught:
        inspect(write(tmp_path, data, form), form)
    assert caught.value.code == code
    assert caught.value.message == str(caught.value)


def test_every_code_is_shown_by_some_refusal() -> None:
    elsewhere = {"unknown_format", "bad_messages"}
    assert {code for _, code, _ in REFUSALS} | elsewhere == set(get_args(DatasetErrorCode))


@pytest.mark.parametrize("value", [None, 2, 0.5])
def test_a_noise_column_marks_every_row(tmp_path: Path, value: object) -> None:
    content = [{"text": "a", "label": 0, "n": 1}, {"text": "b", "label": 1, "n": value}]
    for form in FORMATS:
        with pytest.raises(DatasetError, match=r"row 2: column 'n'.*true or false") as caught:
            inspect(write(tmp_path, encode(content, form), form), form, noise="n")
        assert caught.value.field == "noise"


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_not_there(tmp_path: Path, form: FileFormat) -> None:
    with pytest.raises(DatasetError, match="read") as caught:
        inspect(tmp_path / "none", form)
    assert caught.value.code == "unreadable_file"


def test_a_single_label_may_be_allowed(tmp_path: Path) -> None:
    """For a validation set of one class."""
    path = write(tmp_path, encode([{"text": "a", "label": 1}], "csv"), "csv")
    limits = LIMITS.model_copy(update={"min_labels": 1})
    assert inspect(path, "csv", limits).labels == (1,)


def test_a_small_parquet_file_cannot_unfold_into_a_huge_batch(tmp_path: Path) -> None:
    """A long text that a dictionary stores once is refused before it is repeated in memory."""
    dictionary = pa.DictionaryArray.from_arrays(
        pa.array([0] * 3000, pa.int32()), pa.array(["x" * 500_000])
    )
    path = tmp_path / "data.parquet"
    # Other writers leave no Arrow schema behind that would keep the dictionary on reading.
    pq.write_table(pa.table({"text": dictionary, "label": [0] * 3000}), path, store_schema=False)
    assert path.stat().st_size < 1_000_000
    default = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(default)
    pa.set_memory_pool(counted)
    try:
        with pytest.raises(DatasetError, match=r"row 1: .*more than 100 characters"):
            inspect(path, "parquet")
    finally:
        pa.set_memory_pool(default)
    assert 0 < counted.max_memory() < 100_000_000


@given(
    content=st.binary(max_size=200)
    | st.text(alphabet='",\n\r\\{}[]:textlabel01\0', max_size=200).map(str.encode)
)
@settings(max_examples=300)
def test_no_bytes_break_the_readers(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Whatever the bytes, the answer is a summary or a DatasetError."""
    folder = tmp_path_factory.mktemp("fuzz")
    for form, prefix in [
        ("parquet", b"PAR1"),
        ("jsonl", b'{"text": "a", "label": 0}\n{'),
        ("csv", b"text,label\na,0\n"),
    ]:
        for data in (content, prefix + content):
            try:
                inspect(write(folder, data, form), form)  # type: ignore[arg-type]
            except DatasetError:
                continue
