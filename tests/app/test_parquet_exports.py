"""Corrected Parquet files: types, schema, dictionaries and compression stay."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.app.exporting import Make, rows_of, table
from tests.app.tables import encode, parquet


class TestParquet:
    def test_schema_metadata_and_compression_stay(self, make_export: Make) -> None:
        schema = pa.schema(
            [
                pa.field("when", pa.timestamp("ns", tz="Europe/Berlin")),
                pa.field("text", pa.large_string(), nullable=False),
                pa.field("label", pa.int8(), metadata={"names": "neg,pos"}),
                pa.field("price", pa.decimal128(10, 2)),
                pa.field("tags", pa.list_(pa.struct({"name": pa.string(), "n": pa.int16()}))),
                pa.field("kind", pa.dictionary(pa.int8(), pa.string(), ordered=True)),
                pa.field("bytes", pa.binary()),
            ],
            metadata={"huggingface": '{"info": {"features": {}}}', "own": "x"},
        )
        tags = schema.field("tags").type
        kinds = pa.array(["a", "b"] * 5).dictionary_encode().cast(schema.field("kind").type)
        columns = [
            pa.array([1_700_000_000_123_456_789 + i for i in range(10)], schema.field(0).type),
            pa.array([f"sample {i}" for i in range(10)], pa.large_string()),
            pa.array([i % 2 == 0 for i in range(10)]).cast(pa.int8()),
            pa.array(["1.10"] * 10).cast(pa.decimal128(10, 2)),
            pa.array([[{"name": "x", "n": i}] if i % 3 else None for i in range(10)], tags),
            kinds,
            pa.array([bytes([i, 255]) for i in range(10)]),
        ]
        whole = pa.Table.from_arrays(columns, schema=schema)
        buffer = io.BytesIO()
        pq.write_table(whole, buffer, compression="zstd", row_group_size=3)
        made = make_export(buffer.getvalue(), "t.parquet", labels=("0", "1"))
        made.decide("edit", 0, 4, label="0")
        made.decide("drop", 7)
        file = pq.ParquetFile(io.BytesIO(made.export()))
        sent = pq.read_schema(buffer)
        assert file.schema_arrow.equals(sent, check_metadata=True)
        assert (sent.metadata[b"own"], sent.types) == (b"x", schema.types)
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        label = pa.array([0, 0, 1, 0, 0, 0, 1, 0, 1, 0], pa.int8())
        expected = whole.set_column(2, schema.field("label"), label)
        expected = pa.concat_tables([expected[:7], expected[8:]])
        assert file.read().equals(expected)

    @pytest.mark.parametrize(
        ("kind", "labels"),
        [
            (pa.string(), ("neg", "pos")),
            (pa.large_string(), ("neg", "pos")),
            (pa.string_view(), ("neg", "pos")),
            (pa.dictionary(pa.int8(), pa.string()), ("neg", "pos")),
            (pa.dictionary(pa.int32(), pa.large_string()), ("neg", "pos")),
            (pa.uint8(), ("0", "1")),
            (pa.float32(), ("0", "1")),
            (pa.bool_(), ("0", "1")),
            (pa.dictionary(pa.int8(), pa.int64()), ("0", "1")),
        ],
        ids=str,
    )
    def test_a_label_has_the_type_of_its_column(
        self, make_export: Make, kind: pa.DataType, labels: tuple[str, str]
    ) -> None:
        values: tuple[Any, ...] = labels if labels[0] == "neg" else (0, 1)
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind

        def column(rows: list[int]) -> pa.Array:
            array = pa.array([values[row] for row in rows])
            array = array.cast(pa.int8()).cast(plain) if labels[0] == "0" else array.cast(plain)
            return array.dictionary_encode().cast(kind) if plain != kind else array

        texts = pa.array([f"sample {i}" for i in range(10)])
        of = [int(i % 2 == 0) for i in range(10)]
        content = parquet(pa.table({"text": texts, "label": column(of)}))
        made = make_export(content, "t.parquet", labels=labels)
        made.decide("accept", 9, 8)
        made.decide("edit", 0, label=labels[0])
        exported = pq.read_table(io.BytesIO(made.export()))
        assert (
            exported.schema.field("label").type == pq.read_schema(io.BytesIO(content)).field(1).type
        )
        changed = [0, *of[1:8], 0, 1]
        assert exported["label"].to_pylist() == column(changed).to_pylist()

    def test_a_class_that_the_column_cannot_hold_is_told_before_anything_is_sent(
        self, make_export: Make
    ) -> None:
        content = encode(table((False, True)), "parquet")
        made = make_export(content, "t.parquet", labels=("0", "2"))
        made.decide("edit", 1, label="2")
        answer = made.client.get(f"{made.path}/export")
        assert answer.status_code == 409
        assert "class 2 cannot be written into the column 'label'" in answer.json()["detail"]

    def test_many_row_groups_are_sent_part_by_part(self, make_export: Make) -> None:
        num_rows = 3000
        content = encode(table(num_rows=num_rows), "parquet")
        made = make_export(content, "t.parquet", num_rows=num_rows)
        made.decide("drop", filter={"min_score": 10, "label": "neg"})
        kept = [row for i, row in enumerate(table(num_rows=num_rows)) if i % 2 == 0 or i > 2899]
        assert rows_of(made.export(), "parquet") == kept
