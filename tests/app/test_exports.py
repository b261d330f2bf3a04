"""The corrected training set: the file that was sent, with what was decided and nothing else."""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from app.audits.models import Audit, RankedSample
from app.datasets.files import FileFormat
from app.datasets.storage import cache_folder, hub_table_path, upload_path
from app.db import transaction
from app.references import HubDatasetReference
from app.settings import Settings
from tests.app.exporting import Exported, audited, rows_of
from tests.app.tables import FORMATS, encode, parquet
from tests.factories import make_audit, make_finished_audit, make_ranking

Make = Callable[..., Exported]


@pytest.fixture
def make(client: TestClient, engine: Engine, settings: Settings) -> Make:
    """Uploads a file and makes a finished audit of it."""

    def made(content: bytes, name: str, **options: Any) -> Exported:
        return audited(client, engine, settings, content, name, **options)

    return made


def table(labels: tuple[Any, Any] = ("neg", "pos"), num_rows: int = 10) -> list[dict[str, Any]]:
    """Ten rows with columns before and behind; even ones have the second label."""
    return [
        {"id": i * 7, "text": f"sample {i}", "label": labels[i % 2 == 0], "source": f"=web,{i}"}
        for i in range(num_rows)
    ]


def in_format(rows: list[dict[str, Any]], form: FileFormat) -> list[dict[str, Any]]:
    """Return rows as a reader of the format has them."""
    if form != "csv":
        return rows
    return [{name: str(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("form", FORMATS)
class TestEveryFormat:
    def test_nothing_decided_is_the_same_table(self, make: Make, form: FileFormat) -> None:
        content = encode(table(), form)
        exported = make(content, f"t.{form}").export()
        assert rows_of(exported, form) == in_format(table(), form)
        assert form == "parquet" or exported == content

    def test_dropped_rows_are_out_and_others_have_their_labels(
        self, make: Make, form: FileFormat
    ) -> None:
        made = make(encode(table(), form), f"t.{form}")
        made.decide("accept", 9, 8)
        made.decide("drop", 2, 5)
        made.decide("keep", 7)
        made.decide("edit", 0, label="neg")
        made.decide("drop", 1)
        made.decide("clear", 1)
        expected = table()
        for index, label in ((9, "pos"), (8, "neg"), (0, "neg")):
            expected[index]["label"] = label
        expected = [row for i, row in enumerate(expected) if i not in {2, 5}]
        content = made.export()
        assert rows_of(content, form) == in_format(expected, form)
        assert [list(row) for row in rows_of(content, form)] == [list(row) for row in expected]

    def test_integer_labels_stay_integers(self, make: Make, form: FileFormat) -> None:
        made = make(encode(table((0, 1)), form), f"t.{form}", labels=("0", "1"))
        made.decide("accept", 9)
        made.decide("edit", 4, label="0")
        expected = table((0, 1))
        expected[9]["label"], expected[4]["label"] = 1, 0
        assert rows_of(made.export(), form) == in_format(expected, form)
        before, after = ("0", "1") if form == "csv" else (0, 1)
        assert [(line["index"], line["before"], line["after"]) for line in made.patch()] == [
            (4, after, before),
            (9, before, after),
        ]

    def test_the_flags_alone(self, make: Make, form: FileFormat) -> None:
        """Rows 9 and 8 are flagged; what reviewers decided does not count."""
        made = make(encode(table(), form), f"t.{form}")
        made.decide("drop", 0)
        assert rows_of(made.export(suspects="drop"), form) == in_format(table()[:8], form)
        expected = table()
        expected[9]["label"], expected[8]["label"] = "pos", "neg"
        assert rows_of(made.export(suspects="correct"), form) == in_format(expected, form)

    def test_all_rows_dropped_leave_the_columns(self, make: Make, form: FileFormat) -> None:
        made = make(encode(table(), form), f"t.{form}")
        made.decide("drop", filter={})
        content = made.export()
        assert rows_of(content, form) == []
        if form == "csv":
            assert content == b"id,text,label,source\r\n"

    def test_a_completion_is_rewritten(self, make: Make, form: FileFormat) -> None:
        rows: list[dict[str, Any]] = [
            {"prompt": f"sample {i}", "completion": f" answer {i}", "n": i} for i in range(10)
        ]
        made = make(encode(rows, form), f"t.{form}", is_causal=True)
        made.decide("edit", 3, text=' "better", schön\nand longer')
        rows[3]["completion"] = ' "better", schön\nand longer'
        assert rows_of(made.export(), form) == in_format(rows, form)
        (line,) = made.patch()
        assert (line["change"], line["column"], line["before"]) == (
            *("rewrite", "completion", " answer 3"),
        )

    def test_the_answer_of_a_chat_is_rewritten(self, make: Make, form: FileFormat) -> None:
        def chat(answer: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

        rows: list[dict[str, Any]] = [{"messages": chat(f"a {i}"), "n": i} for i in range(10)]
        sent = rows
        if form == "csv":
            sent = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
        made = make(encode(sent, form), f"t.{form}", is_causal=True)
        made.decide("edit", 3, text="better")
        made.decide("drop", 4)
        exported = rows_of(made.export(), form)
        if form == "csv":
            exported = [
                {"messages": json.loads(row["messages"]), "n": int(row["n"])} for row in exported
            ]
        rows[3]["messages"] = chat("better")
        assert exported == [row for row in rows if row["n"] != 4]


class TestPatch:
    def test_a_line_for_every_changed_row(self, make: Make) -> None:
        made = make(encode(table(), "csv"), "t.csv")
        batch = made.decide("accept", 9)
        made.decide("drop", 2)
        made.decide("keep", 3)
        made.decide("accept", 1)  # its suggestion is what it has
        lines = made.patch()
        assert lines[1] == {
            "index": 9,
            "change": "relabel",
            "column": "label",
            "before": "neg",
            "after": "pos",
            "reviewer": "test",
            "decided_at": lines[1]["decided_at"],
        }
        assert lines[1]["decided_at"][:19] == batch["created_at"][:19]
        assert (lines[0]["index"], lines[0]["change"], lines[0]["column"]) == (2, "drop", None)
        assert len(lines) == 2

    def test_nobody_stands_behind_a_flag(self, make: Make) -> None:
        made = make(encode(table(), "parquet"), "t.parquet")
        lines = made.patch(suspects="drop")
        assert [(line["index"], line["reviewer"]) for line in lines] == [(8, None), (9, None)]

    def test_another_rankings_flags(self, make: Make, engine: Engine, settings: Settings) -> None:
        made = make(encode(table(), "csv"), "t.csv")
        with transaction(engine) as session:
            audit = session.get_one(Audit, made.path.rpartition("/")[2])
        other = make_ranking(engine, audit, settings=settings)
        lines = made.patch(suspects="drop", ranking_id=other.id)
        assert [line["index"] for line in lines] == [0]


class TestTextFiles:
    def test_csv_keeps_every_byte_of_what_does_not_change(self, make: Make) -> None:
        """A byte order mark, needless quotes, cells over lines, blank lines, no end of line."""
        rows = [
            b'\xef\xbb\xbf"text",id,"label"\r\n',
            b'"sample, ""0""\r\nover lines",1,"pos"\r\n',
            b"\r\n",
            b"sample 1,2,neg\n",
            b'sample 2,"3",pos\n',
            b'sample 3,4,"neg"',
        ]
        made = make(b"".join(rows), "t.csv", num_rows=4)
        made.decide("edit", 0, 2, label="neg")
        made.decide("edit", 1, 3, label="pos")
        rows[1] = rows[1].replace(b'"pos"', b'"neg"')
        rows[3] = b"sample 1,2,pos\n"
        rows[4] = b'sample 2,"3",neg\n'
        rows[5] = b'sample 3,4,"pos"'
        assert made.export() == b"".join(rows)
        made.decide("drop", 0)
        assert made.export() == b"".join(row for i, row in enumerate(rows) if i != 1)

    def test_a_label_that_needs_quotes_gets_them(self, make: Make) -> None:
        labels = ('a "b", c', "pos")
        made = make(encode(table(labels), "csv"), "t.csv", labels=labels)
        made.decide("edit", 0, label=labels[0])
        assert rows_of(made.export(), "csv")[0]["label"] == labels[0]

    def test_jsonl_keeps_every_byte_of_what_does_not_change(self, make: Make) -> None:
        """Spaces, escapes, numbers as they were written, nested values, a name that comes twice."""
        rows = [
            '\ufeff{"label": "pos", "n": 1.50, "text":"s\\u00e4mple", "more": {"label": "x"}}\n',
            "\n",
            '{"text": "schön", "label":"neg" , "label" : "neg", "big": 12345678901234567890}\r\n',
            '  {"text": "a}\\"{", "n": 1e5, "label": "pos"}  \n',
            '{"text": "sample 3", "label": "neg"}',
        ]
        made = make("".join(rows).encode(), "t.jsonl", num_rows=4)
        made.decide("edit", 0, 2, label="neg")
        made.decide("edit", 1, label="pos")
        made.decide("drop", 3)
        rows[0] = rows[0].replace('"label": "pos"', '"label": "neg"')
        rows[2] = rows[2].replace('"label" : "neg"', '"label" : "pos"')
        rows[3] = rows[3].replace('"pos"', '"neg"')
        assert made.export() == "".join(rows[:4]).encode()

    def test_json_labels_keep_their_type(self, make: Make) -> None:
        for labels in ((False, True), (0.0, 1.0)):
            made = make(encode(table(labels), "jsonl"), "t.jsonl", labels=("0", "1"))
            made.decide("edit", 0, label="0")
            written = rows_of(made.export(), "jsonl")[0]["label"]
            assert (type(written), written) == (type(labels[0]), labels[0])

    def test_formulas_stay_what_they_are(self, make: Make) -> None:
        """It is data to train with, not a sheet to look at."""
        rows = [{**row, "text": "=1+1"} for row in table()]
        made = make(encode(rows, "csv"), "t.csv")
        made.decide("edit", 0, label="neg")
        assert b"=1+1" in made.export()
        assert b"'=1+1" not in made.export()


class TestParquet:
    def test_schema_metadata_and_compression_stay(self, make: Make) -> None:
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
        made = make(buffer.getvalue(), "t.parquet", labels=("0", "1"))
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
        self, make: Make, kind: pa.DataType, labels: tuple[str, str]
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
        made = make(content, "t.parquet", labels=labels)
        made.decide("accept", 9, 8)
        made.decide("edit", 0, label=labels[0])
        exported = pq.read_table(io.BytesIO(made.export()))
        assert (
            exported.schema.field("label").type == pq.read_schema(io.BytesIO(content)).field(1).type
        )
        changed = [0, *of[1:8], 0, 1]
        assert exported["label"].to_pylist() == column(changed).to_pylist()

    def test_a_class_that_the_column_cannot_hold_is_told_before_anything_is_sent(
        self, make: Make
    ) -> None:
        content = encode(table((False, True)), "parquet")
        made = make(content, "t.parquet", labels=("0", "2"))
        made.decide("edit", 1, label="2")
        answer = made.client.get(f"{made.path}/export")
        assert answer.status_code == 409
        assert "class 2 cannot be written into the column 'label'" in answer.json()["detail"]

    def test_many_row_groups_are_sent_part_by_part(self, make: Make) -> None:
        num_rows = 3000
        content = encode(table(num_rows=num_rows), "parquet")
        made = make(content, "t.parquet", num_rows=num_rows)
        made.decide("drop", filter={"min_score": 10, "label": "neg"})
        kept = [row for i, row in enumerate(table(num_rows=num_rows)) if i % 2 == 0 or i > 2899]
        assert rows_of(made.export(), "parquet") == kept


class TestPlantedNoise:
    """Row 9 was planted: the audit judged another label than the file has."""

    @pytest.fixture
    def planted(self, make: Make) -> Exported:
        rows = table()
        rows[9]["label"] = "pos"  # the audit saw neg
        return make(encode(rows, "jsonl"), "t.jsonl", plants=True)

    def labels(self, planted: Exported, **query: str) -> dict[int, str]:
        return {row["id"] // 7: row["label"] for row in rows_of(planted.export(**query), "jsonl")}

    def test_a_planted_label_never_gets_into_the_file(self, planted: Exported) -> None:
        assert self.labels(planted)[9] == "pos"
        planted.decide("keep", 9)
        assert self.labels(planted)[9] == "pos"
        planted.decide("accept", 9)  # which is the label of the file
        assert self.labels(planted)[9] == "pos"
        assert planted.patch() == []

    def test_accepting_the_planted_label_does_not_write_it(
        self, planted: Exported, engine: Engine
    ) -> None:
        with transaction(engine) as session:
            session.execute(
                update(RankedSample).where(RankedSample.rank == 0).values(suggested_label="neg")
            )
        planted.decide("accept", 9)
        assert self.labels(planted)[9] == "pos"

    def test_what_was_wrong_by_planting_is_not_dropped(self, planted: Exported) -> None:
        planted.decide("drop", 9, 8)
        assert set(self.labels(planted)) == {*range(8), 9}
        assert set(self.labels(planted, suspects="drop")) == {*range(8), 9}

    def test_flags_correct_only_what_was_not_planted(self, planted: Exported) -> None:
        labels = self.labels(planted, suspects="correct")
        assert (labels[9], labels[8]) == ("pos", "neg")

    def test_what_a_reviewer_writes_is_taken(self, planted: Exported) -> None:
        planted.decide("edit", 9, label="neg")
        assert self.labels(planted)[9] == "neg"

    def test_known_noise_is_the_files_own(self, make: Make) -> None:
        """Where a column of the file says so, the label is in the file, and is dropped."""
        made = make(encode(table(), "jsonl"), "t.jsonl")
        made.decide("drop", 9)
        assert 63 not in {row["id"] for row in rows_of(made.export(), "jsonl")}


class TestTheOriginal:
    def conflict(self, made: Exported) -> str:
        details = []
        for rest in ("export", "export/patch"):
            answer = made.client.get(f"{made.path}/{rest}")
            assert answer.status_code == 409, answer.text
            details.append(answer.json()["detail"])
        assert details[0] == details[1]
        return str(details[0])

    def test_a_deleted_upload_is_gone(self, make: Make) -> None:
        made = make(encode(table(), "csv"), "t.csv")
        assert made.client.delete(f"/v1/datasets/{made.dataset_id}").status_code == 204
        assert f"The upload {made.dataset_id} was deleted" in self.conflict(made)

    def test_a_lost_file_is_gone(self, make: Make, settings: Settings) -> None:
        made = make(encode(table(), "csv"), "t.csv")
        upload_path(settings.data_dir, made.dataset_id, "csv").unlink()
        assert "The file of t.csv is gone" in self.conflict(made)

    def test_a_changed_file_is_not_the_one(self, make: Make, settings: Settings) -> None:
        made = make(encode(table(), "csv"), "t.csv")
        path = upload_path(settings.data_dir, made.dataset_id, "csv")
        path.write_bytes(path.read_bytes().replace(b"sample 3", b"sample 4"))
        assert "t.csv is not the file any more that the audit read" in self.conflict(made)

    def moved(self, made: Exported, engine: Engine, reference: str, **provenance: Any) -> None:
        with transaction(engine) as session:
            audit = session.get_one(Audit, made.path.rpartition("/")[2])
            train = {**audit.request["train"], "reference": reference}
            audit.request = {**audit.request, "train": train}
            audit.provenance = {**audit.provenance, **provenance}

    def test_a_file_of_the_server(self, make: Make, engine: Engine, settings: Settings) -> None:
        content = encode(table(), "csv")
        made = make(content, "t.csv")
        path = settings.file_roots[0] / "reviews.csv"
        path.write_bytes(content)
        self.moved(made, engine, f"file://{path}")
        answer = made.client.get(f"{made.path}/export")
        assert answer.content == content
        assert 'filename="reviews-cleaned.csv"' in answer.headers["content-disposition"]
        path.unlink()
        assert "there is no such file or folder" in self.conflict(made)

    def test_a_split_of_the_hub_comes_as_parquet(
        self, make: Make, engine: Engine, settings: Settings
    ) -> None:
        content = encode(table(), "parquet")
        made = make(content, "t.parquet")
        commit = "c" * 40
        self.moved(made, engine, "hf://datasets/org/texts@main?split=train", train_revision=commit)
        assert "earlier version of the service" in self.conflict(made)
        sha256 = hashlib.sha256(content).hexdigest()
        self.moved(
            *(made, engine, "hf://datasets/org/texts@main?split=train"),
            train_file={"format": "parquet", "bytes": len(content), "sha256": sha256},
        )
        assert "is gone" in self.conflict(made)
        pinned = HubDatasetReference("org/texts", commit)
        path = hub_table_path(cache_folder(settings.data_dir), pinned)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        answer = made.client.get(f"{made.path}/export")
        assert rows_of(answer.content, "parquet") == table()
        disposition = answer.headers["content-disposition"]
        assert 'filename="org-texts-train-cleaned.parquet"' in disposition

    def test_any_name_can_be_downloaded(self, make: Make) -> None:
        made = make(encode(table(), "csv"), "schöne Texte; x.CSV")
        disposition = made.client.get(f"{made.path}/export").headers["content-disposition"]
        assert disposition == (
            'attachment; filename="sch_ne Texte_ x-cleaned.csv"; '
            "filename*=UTF-8''sch%C3%B6ne%20Texte%3B%20x-cleaned.csv"
        )
        patch = made.client.get(f"{made.path}/export/patch").headers["content-disposition"]
        assert "-patch.jsonl" in patch


class TestRefusals:
    @pytest.mark.parametrize("rest", ["export", "export/patch"])
    def test_what_there_is_nothing_to_export_of(
        self, client: TestClient, engine: Engine, settings: Settings, rest: str
    ) -> None:
        running, done = make_audit(engine), make_finished_audit(engine, settings)
        assert client.get(f"/v1/audits/{running.id}/{rest}").status_code == 409
        assert client.get(f"/v1/audits/aud_nope/{rest}").status_code == 404
        assert client.get(f"/v1/audits/{done.id}/{rest}?ranking_id=rnk_nope").status_code == 404
        answer = client.get(f"/v1/audits/{done.id}/{rest}?suspects=all")
        assert answer.json()["errors"][0]["pointer"] == "query.suspects"
