"""Uploaded tables: what is read, and in which form."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.datasets.columns import NUL
from app.datasets.files import (
    ColumnNames,
    DatasetError,
    FileFormat,
    guess_format,
    write_normalised_parquet,
)
from tests.app.tables import FORMATS, LIMITS, ROWS, encode, inspect, parquet, read, write


@pytest.mark.parametrize("form", FORMATS)
class TestEveryFormat:
    def test_rows_come_out_in_one_form(self, tmp_path: Path, form: FileFormat) -> None:
        path = write(tmp_path, encode(ROWS, form), form)
        assert read(path, form) == [row | {"text_pair": None, "is_noisy": None} for row in ROWS]

    def test_the_summary_tells_what_is_there(self, tmp_path: Path, form: FileFormat) -> None:
        summary = inspect(write(tmp_path, encode(ROWS, form), form), form)
        assert summary.num_rows == 3
        assert summary.labels == (0, 1)
        assert summary.label_type == "integer"
        assert summary.label_counts == {"0": 1, "1": 2}
        assert summary.longest_text_chars == 15
        assert summary.mean_text_chars == pytest.approx((11 + 15 + 7) / 3)
        assert not summary.has_text_pair
        assert summary.num_noisy is None
        assert [column.name for column in summary.columns] == ["text", "label"]

    def test_named_columns_and_text_labels(self, tmp_path: Path, form: FileFormat) -> None:
        rows = [
            {"premise": "a", "hypothesis": "b", "gold": "yes", "wrong": True, "extra": 1},
            {"premise": "c", "hypothesis": "d", "gold": "no", "wrong": False, "extra": 2},
        ]
        names: dict[str, Any] = {
            "text": "premise",
            "text_pair": "hypothesis",
            "label": "gold",
            "noise": "wrong",
        }
        path = write(tmp_path, encode(rows, form), form)
        assert read(path, form, **names) == [
            {"text": "a", "text_pair": "b", "label": "yes", "is_noisy": True},
            {"text": "c", "text_pair": "d", "label": "no", "is_noisy": False},
        ]
        summary = inspect(path, form, **names)
        assert summary.labels == ("no", "yes")
        assert summary.has_text_pair
        assert summary.num_noisy == 1

    def test_many_batches_keep_their_order_and_row_numbers(
        self, tmp_path: Path, form: FileFormat
    ) -> None:
        rows = [{"text": f"text {i}", "label": i % 3} for i in range(2500)]
        path = write(tmp_path, encode(rows, form), form)
        assert [row["text"] for row in read(path, form)] == [row["text"] for row in rows]
        rows[2222]["text"] = "  \n"
        path = write(tmp_path, encode(rows, form), form)
        with pytest.raises(DatasetError, match="row 2,223: column 'text' is empty") as caught:
            inspect(path, form)
        assert caught.value.row == 2223

    def test_the_normalised_file_equals_what_is_read(
        self, tmp_path: Path, form: FileFormat
    ) -> None:
        """And it is a dataset itself, with the same summary but for its columns."""
        path, target = write(tmp_path, encode(ROWS * 900, form), form), tmp_path / "normal.parquet"
        summary = write_normalised_parquet(
            path, target, format=form, columns=ColumnNames(), limits=LIMITS
        )
        assert pq.read_table(target).to_pylist() == read(path, form)
        assert summary == inspect(path, form)
        assert inspect(target, "parquet").labels == summary.labels

    def test_a_refused_file_leaves_no_normalised_one(
        self, tmp_path: Path, form: FileFormat
    ) -> None:
        rows = [*ROWS * 700, {"text": "", "label": 0}]
        path = write(tmp_path, encode(rows, form), form)
        with pytest.raises(DatasetError):
            write_normalised_parquet(
                path, tmp_path / "x.parquet", format=form, columns=ColumnNames(), limits=LIMITS
            )
        assert list(tmp_path.iterdir()) == [path]


class TestTypes:
    def labels(self, tmp_path: Path, values: pa.Array) -> list[Any]:
        table = pa.table({"text": ["x"] * len(values), "label": values})
        path = write(tmp_path, parquet(table), "parquet")
        return [row["label"] for row in read(path, "parquet")]

    @pytest.mark.parametrize(
        "data_type", [pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.int64()]
    )
    def test_numbers_become_integers(self, tmp_path: Path, data_type: pa.DataType) -> None:
        labels = self.labels(tmp_path, pa.array([0, 2], data_type))
        assert labels == [0, 2]
        assert {type(label) for label in labels} == {int}

    def test_booleans_become_0_and_1(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, pa.array([False, True])) == [0, 1]

    @pytest.mark.parametrize("data_type", [pa.large_string(), pa.string_view()])
    def test_all_kinds_of_strings_are_strings(self, tmp_path: Path, data_type: pa.DataType) -> None:
        column = pa.array(["a", "b"]).cast(data_type)
        path = write(tmp_path, parquet(pa.table({"text": column, "label": column})), "parquet")
        assert [(row["text"], row["label"]) for row in read(path, "parquet")] == [
            ("a", "a"),
            ("b", "b"),
        ]

    def test_categories_are_their_values(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, pa.array(["a", "b"]).dictionary_encode()) == ["a", "b"]

    @pytest.mark.parametrize(
        ("cells", "labels"),
        [
            (["1", "-2"], [1, -2]),
            (["1", "x"], ["1", "x"]),
            (["01", "02"], ["01", "02"]),
            (["1.0", "2.0"], ["1.0", "2.0"]),
            (["9" * 19, "1"], ["9" * 19, "1"]),
        ],
    )
    def test_csv_labels_are_integers_only_if_nothing_is_lost(
        self, tmp_path: Path, cells: list[str], labels: list[int | str]
    ) -> None:
        rows = [{"text": "x", "label": cell} for cell in cells]
        path = write(tmp_path, encode(rows, "csv"), "csv")
        assert [row["label"] for row in read(path, "csv")] == labels

    @pytest.mark.parametrize(
        ("yes", "no"), [(True, False), (1, 0), (1.0, 0.0), ("true", "FALSE"), ("1", "0")]
    )
    def test_ways_to_mark_noise(self, tmp_path: Path, yes: object, no: object) -> None:
        rows = [{"text": "x", "label": 0, "noise": yes}, {"text": "x", "label": 1, "noise": no}]
        path = write(tmp_path, encode(rows, "parquet"), "parquet")
        assert [row["is_noisy"] for row in read(path, "parquet", noise="noise")] == [True, False]

    def test_a_csv_with_a_byte_order_mark_and_blank_lines(self, tmp_path: Path) -> None:
        content = b'\xef\xbb\xbftext,label\r\n\r\n"a\r\n\r\nb",0\r\n\r\nc,1\r\n'
        rows = read(write(tmp_path, content, "csv"), "csv")
        assert [row["text"] for row in rows] == ["a\r\n\r\nb", "c"]

    def test_one_column_may_serve_twice(self, tmp_path: Path) -> None:
        path = write(tmp_path, encode([{"text": "a"}, {"text": "b"}], "parquet"), "parquet")
        assert [row["label"] for row in read(path, "parquet", label="text")] == ["a", "b"]


@given(
    texts=st.lists(
        st.text(min_size=1, max_size=100).filter(lambda text: text.strip() and NUL not in text),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=100)
def test_every_text_survives_every_format(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for form in FORMATS:
        content = encode([{"text": text, "label": "x"} for text in texts], form)
        path = write(folder, content, form)
        assert [row["text"] for row in read(path, form)] == texts


class TestFormat:
    @pytest.mark.parametrize(
        ("name", "head", "form"),
        [
            ("a.parquet", b"PAR1\x15", "parquet"),
            ("a.csv", b"PAR1\x15", "parquet"),
            ("a.CSV", b"text,label", "csv"),
            ("a.jsonl", b'{"text"', "jsonl"),
            ("a.ndjson", b"", "jsonl"),
            ("a.json", b' \n{"text"', "jsonl"),
            ("upload", b'\xef\xbb\xbf{"text"', "jsonl"),
        ],
    )
    def test_by_bytes_then_by_name(self, name: str, head: bytes, form: str) -> None:
        assert guess_format(name, head) == form

    @pytest.mark.parametrize(
        ("name", "head", "message"),
        [
            ("a.parquet", b"text,label", "not a Parquet file"),
            ("a.csv.gz", b"\x1f\x8b\x08", "archive"),
            ("a.zip", b"PK\x03\x04", "archive"),
            ("a.json", b'[{"text"', "one JSON object per line"),
            ("a.txt", b"text", "name it"),
            ("", b"", "name it"),
        ],
    )
    def test_unknown(self, name: str, head: bytes, message: str) -> None:
        with pytest.raises(DatasetError, match=message) as caught:
            guess_format(name, head)
        assert caught.value.code == "unknown_format"
