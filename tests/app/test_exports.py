"""The corrected training set: the file that was sent, with what was decided and nothing else."""

import hashlib
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from app.audits.models import Audit, RankedSample
from app.datasets.files import FileFormat
from app.datasets.storage import cache_folder, fetched_path, hub_table_path, upload_path
from app.db import transaction
from app.references import HubDatasetReference
from app.settings import Settings
from tests.app.exporting import Exported, Make, in_format, rows_of, table
from tests.app.tables import FORMATS, encode
from tests.factories import make_audit, make_finished_audit, make_ranking


@pytest.mark.parametrize("form", FORMATS)
class TestEveryFormat:
    def test_nothing_decided_is_the_same_table(self, make_export: Make, form: FileFormat) -> None:
        content = encode(table(), form)
        exported = make_export(content, f"t.{form}").export()
        assert rows_of(exported, form) == in_format(table(), form)
        assert form == "parquet" or exported == content

    def test_dropped_rows_are_out_and_others_have_their_labels(
        self, make_export: Make, form: FileFormat
    ) -> None:
        made = make_export(encode(table(), form), f"t.{form}")
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

    def test_integer_labels_stay_integers(self, make_export: Make, form: FileFormat) -> None:
        made = make_export(encode(table((0, 1)), form), f"t.{form}", labels=("0", "1"))
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

    def test_the_flags_alone(self, make_export: Make, form: FileFormat) -> None:
        """Rows 9 and 8 are flagged; what reviewers decided does not count."""
        made = make_export(encode(table(), form), f"t.{form}")
        made.decide("drop", 0)
        assert rows_of(made.export(suspects="drop"), form) == in_format(table()[:8], form)
        expected = table()
        expected[9]["label"], expected[8]["label"] = "pos", "neg"
        assert rows_of(made.export(suspects="correct"), form) == in_format(expected, form)

    def test_all_rows_dropped_leave_the_columns(self, make_export: Make, form: FileFormat) -> None:
        made = make_export(encode(table(), form), f"t.{form}")
        made.decide("drop", filter={})
        content = made.export()
        assert rows_of(content, form) == []
        if form == "csv":
            assert content == b"id,text,label,source\r\n"

    def test_a_completion_is_rewritten(self, make_export: Make, form: FileFormat) -> None:
        rows: list[dict[str, Any]] = [
            {"prompt": f"sample {i}", "completion": f" answer {i}", "n": i} for i in range(10)
        ]
        made = make_export(encode(rows, form), f"t.{form}", is_causal=True)
        made.decide("edit", 3, text=' "better", schön\nand longer')
        rows[3]["completion"] = ' "better", schön\nand longer'
        assert rows_of(made.export(), form) == in_format(rows, form)
        (line,) = made.patch()
        assert (line["change"], line["column"], line["before"]) == (
            *("rewrite", "completion", " answer 3"),
        )

    def test_the_answer_of_a_chat_is_rewritten(self, make_export: Make, form: FileFormat) -> None:
        def chat(answer: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

        rows: list[dict[str, Any]] = [{"messages": chat(f"a {i}"), "n": i} for i in range(10)]
        sent = rows
        if form == "csv":
            sent = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
        made = make_export(encode(sent, form), f"t.{form}", is_causal=True)
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
    def test_a_line_for_every_changed_row(self, make_export: Make) -> None:
        made = make_export(encode(table(), "csv"), "t.csv")
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

    def test_nobody_stands_behind_a_flag(self, make_export: Make) -> None:
        made = make_export(encode(table(), "parquet"), "t.parquet")
        lines = made.patch(suspects="drop")
        assert [(line["index"], line["reviewer"]) for line in lines] == [(8, None), (9, None)]

    def test_another_rankings_flags(
        self, make_export: Make, engine: Engine, settings: Settings
    ) -> None:
        made = make_export(encode(table(), "csv"), "t.csv")
        with transaction(engine) as session:
            audit = session.get_one(Audit, made.path.rpartition("/")[2])
        other = make_ranking(engine, audit, settings=settings)
        lines = made.patch(suspects="drop", ranking_id=other.id)
        assert [line["index"] for line in lines] == [0]


class TestTextFiles:
    def test_csv_keeps_every_byte_of_what_does_not_change(self, make_export: Make) -> None:
        """A byte order mark, needless quotes, cells over lines, blank lines, no end of line."""
        rows = [
            b'\xef\xbb\xbf"text",id,"label"\r\n',
            b'"sample, ""0""\r\nover lines",1,"pos"\r\n',
            b"\r\n",
            b"sample 1,2,neg\n",
            b'sample 2,"3",pos\n',
            b'sample 3,4,"neg"',
        ]
        made = make_export(b"".join(rows), "t.csv", num_rows=4)
        made.decide("edit", 0, 2, label="neg")
        made.decide("edit", 1, 3, label="pos")
        rows[1] = rows[1].replace(b'"pos"', b'"neg"')
        rows[3] = b"sample 1,2,pos\n"
        rows[4] = b'sample 2,"3",neg\n'
        rows[5] = b'sample 3,4,"pos"'
        assert made.export() == b"".join(rows)
        made.decide("drop", 0)
        assert made.export() == b"".join(row for i, row in enumerate(rows) if i != 1)

    def test_a_label_that_needs_quotes_gets_them(self, make_export: Make) -> None:
        labels = ('a "b", c', "pos")
        made = make_export(encode(table(labels), "csv"), "t.csv", labels=labels)
        made.decide("edit", 0, label=labels[0])
        assert rows_of(made.export(), "csv")[0]["label"] == labels[0]

    def test_jsonl_keeps_every_byte_of_what_does_not_change(self, make_export: Make) -> None:
        """Spaces, escapes, numbers as they were written, nested values, a name that comes twice."""
        rows = [
            '\ufeff{"label": "pos", "n": 1.50, "text":"s\\u00e4mple", "more": {"label": "x"}}\n',
            "\n",
            '{"text": "schön", "label":"neg" , "label" : "neg", "big": 12345678901234567890}\r\n',
            '  {"text": "a}\\"{", "n": 1e5, "label": "pos"}  \n',
            '{"text": "sample 3", "label": "neg"}',
        ]
        made = make_export("".join(rows).encode(), "t.jsonl", num_rows=4)
        made.decide("edit", 0, 2, label="neg")
        made.decide("edit", 1, label="pos")
        made.decide("drop", 3)
        rows[0] = rows[0].replace('"label": "pos"', '"label": "neg"')
        rows[2] = rows[2].replace('"label" : "neg"', '"label" : "pos"')
        rows[3] = rows[3].replace('"pos"', '"neg"')
        assert made.export() == "".join(rows[:4]).encode()

    def test_json_labels_keep_their_type(self, make_export: Make) -> None:
        for labels in ((False, True), (0.0, 1.0)):
            made = make_export(encode(table(labels), "jsonl"), "t.jsonl", labels=("0", "1"))
            made.decide("edit", 0, label="0")
            written = rows_of(made.export(), "jsonl")[0]["label"]
            assert (type(written), written) == (type(labels[0]), labels[0])

    def test_formulas_stay_what_they_are(self, make_export: Make) -> None:
        """It is data to train with, not a sheet to look at."""
        rows = [{**row, "text": "=1+1"} for row in table()]
        made = make_export(encode(rows, "csv"), "t.csv")
        made.decide("edit", 0, label="neg")
        assert b"=1+1" in made.export()
        assert b"'=1+1" not in made.export()


class TestPlantedNoise:
    """Row 9 was planted: the audit judged another label than the file has."""

    @pytest.fixture
    def planted(self, make_export: Make) -> Exported:
        rows = table()
        rows[9]["label"] = "pos"  # the audit saw neg
        return make_export(encode(rows, "jsonl"), "t.jsonl", plants=True)

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

    def test_known_noise_is_the_files_own(self, make_export: Make) -> None:
        """Where a column of the file says so, the label is in the file, and is dropped."""
        made = make_export(encode(table(), "jsonl"), "t.jsonl")
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

    def test_a_deleted_upload_is_gone(self, make_export: Make) -> None:
        made = make_export(encode(table(), "csv"), "t.csv")
        assert made.client.delete(f"/v1/datasets/{made.dataset_id}").status_code == 204
        assert f"The upload {made.dataset_id} was deleted" in self.conflict(made)

    def test_a_lost_file_is_gone(self, make_export: Make, settings: Settings) -> None:
        made = make_export(encode(table(), "csv"), "t.csv")
        upload_path(settings.data_dir, made.dataset_id, "csv").unlink()
        assert "The file of t.csv is gone" in self.conflict(made)

    def test_a_changed_file_is_not_the_one(self, make_export: Make, settings: Settings) -> None:
        made = make_export(encode(table(), "csv"), "t.csv")
        path = upload_path(settings.data_dir, made.dataset_id, "csv")
        path.write_bytes(path.read_bytes().replace(b"sample 3", b"sample 4"))
        assert "t.csv is not the file any more that the audit read" in self.conflict(made)

    def moved(self, made: Exported, engine: Engine, reference: str, **provenance: Any) -> None:
        with transaction(engine) as session:
            audit = session.get_one(Audit, made.path.rpartition("/")[2])
            train = {**audit.request["train"], "reference": reference}
            audit.request = {**audit.request, "train": train}
            audit.provenance = {**audit.provenance, **provenance}

    def test_a_file_of_the_server(
        self, make_export: Make, engine: Engine, settings: Settings
    ) -> None:
        content = encode(table(), "csv")
        made = make_export(content, "t.csv")
        path = settings.file_roots[0] / "reviews.csv"
        path.write_bytes(content)
        self.moved(made, engine, f"file://{path}")
        answer = made.client.get(f"{made.path}/export")
        assert answer.content == content
        assert 'filename="reviews-cleaned.csv"' in answer.headers["content-disposition"]
        path.unlink()
        assert "there is no such file or folder" in self.conflict(made)

    def test_a_split_of_the_hub_comes_as_parquet(
        self, make_export: Make, engine: Engine, settings: Settings
    ) -> None:
        content = encode(table(), "parquet")
        made = make_export(content, "t.parquet")
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

    @pytest.mark.parametrize(
        "reference", ["https://host.test/a/t.csv?sig=1", "s3://bucket/a/t.csv"]
    )
    def test_what_was_fetched_from_elsewhere_is_still_here(
        self, make_export: Make, engine: Engine, settings: Settings, reference: str
    ) -> None:
        content = encode(table(), "csv")
        made = make_export(content, "t.csv")
        sha256 = hashlib.sha256(content).hexdigest()
        noted = {"format": "csv", "bytes": len(content), "sha256": sha256}
        self.moved(made, engine, reference, train_revision=sha256, train_file=noted)
        assert "is gone" in self.conflict(made)
        path = fetched_path(cache_folder(settings.data_dir), sha256, "csv")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        answer = made.client.get(f"{made.path}/export")
        assert answer.content == content
        assert 'filename="t-cleaned.csv"' in answer.headers["content-disposition"]

    def test_any_name_can_be_downloaded(self, make_export: Make) -> None:
        made = make_export(encode(table(), "csv"), "schöne Texte; x.CSV")
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
