"""`winnow suspects`, `export`, `rank` and `doctor` against the real application."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from celery import Celery
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update
from winnow import Client

from app.audits.models import Audit, TrainingSample
from app.db import transaction
from app.main import create_app
from app.settings import Settings
from tests.app.exporting import Exported, audited
from tests.client.conftest import Winnow
from tests.factories import long_ago, make_audit, make_finished_audit, make_ranking

RANK = ("--aggregation", "rank")
ROWS = [
    {"id": str(7 * i), "text": f"sample {i}", "label": "neg" if i % 2 else "pos", "source": "web"}
    for i in range(10)
]


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.fixture
def exported(
    settings: Settings, engine: Engine, celery: Celery, api_key: str, url: str
) -> Exported:
    """An audit of an uploaded table; the two most suspect rows, 9 and 8, are flagged."""
    api = create_app(settings, engine, celery)
    sender = TestClient(api, headers={"Authorization": f"Bearer {api_key}"})
    return audited(sender, engine, settings, as_csv(ROWS).encode(), "reviews.csv")


def audit_of(exported: Exported) -> str:
    return exported.path.rpartition("/")[2]


class TestSuspects:
    def test_the_table_shows_what_is_wrong(self, winnow: Winnow, exported: Exported) -> None:
        shown = winnow("suspects", audit_of(exported), "--limit", "3").stdout
        first = next(line for line in shown.splitlines() if "sample 9" in line)
        for word in ("0", "9", "sample 9", "neg → pos 75%", "100%"):
            assert word in first
        assert len([line for line in shown.splitlines() if "sample" in line]) == 3

    def test_filters_are_the_services(self, winnow: Winnow, exported: Exported) -> None:
        audit_id = audit_of(exported)

        def rows(*options: str) -> list[int]:
            found = winnow("suspects", audit_id, *options, "--json")
            return [suspect["index"] for suspect in json.loads(found.stdout)]

        assert rows("--flagged") == [9, 8]
        assert rows("--not-flagged", "--limit", "2") == [7, 6]
        assert rows("--label", "pos", "--limit", "2") == [8, 6]
        assert rows("--suggested-label", "pos", "--max-score", "0.25") == [9, 7]
        assert rows("--search", "SAMPLE 3") == [3]
        nothing = winnow("suspects", audit_id, "--search", "elsewhere")
        assert (nothing.exit_code, nothing.stdout) == (0, "")

    def test_control_characters_and_markup_stay_text(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        with transaction(engine) as session:
            session.execute(update(TrainingSample).values(text="[red]a\x1b[2J\nb"))
        shown = winnow("suspects", audit.id, "--limit", "1").stdout
        assert "[red]a [2J b" in shown
        assert "\x1b[2J" not in shown

    def test_a_causal_language_models_samples_have_no_labels(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings, has_labels=False)
        assert "not finite" in winnow("suspects", audit.id).stdout

    def test_results_before_the_end_are_a_conflict(self, winnow: Winnow, engine: Engine) -> None:
        result = winnow("suspects", make_audit(engine).id)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


class TestExport:
    @pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
    def test_the_ranking_in_every_format(
        self, winnow: Winnow, exported: Exported, tmp_path: Path, ending: str
    ) -> None:
        path = tmp_path / f"mine.{ending}"
        assert winnow("export", audit_of(exported), "-o", path).exit_code == 0
        named = winnow("export", audit_of(exported), "--format", ending, "-o", tmp_path, "--json")
        other = Path(json.loads(named.stdout)["file"])
        assert other.read_bytes() == path.read_bytes()
        assert other.suffix == path.suffix
        if ending == "parquet":
            assert pq.read_table(path)["index"].to_pylist() == [*reversed(range(10))]

    def test_dropped(self, winnow: Winnow, exported: Exported, tmp_path: Path) -> None:
        path = tmp_path / "clean.csv"
        result = winnow("export", audit_of(exported), "--apply", "drop", "-o", path, "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["changes"] == {"drop": 2}
        assert path.read_bytes().decode() == as_csv(ROWS[:8])
        lines = (tmp_path / "clean.csv.patch.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == [8, 9]

    def test_corrected_under_the_services_name(
        self, winnow: Winnow, exported: Exported, tmp_path: Path
    ) -> None:
        result = winnow("export", audit_of(exported), "--apply", "correct", "-o", tmp_path)
        assert "2 × relabel" in result.stderr
        expected = [row.copy() for row in ROWS]
        expected[8]["label"], expected[9]["label"] = "neg", "pos"
        assert (tmp_path / "reviews-cleaned.csv").read_bytes().decode() == as_csv(expected)
        assert (tmp_path / "reviews-cleaned.csv.patch.jsonl").exists()

    def test_decided(
        self, winnow: Winnow, exported: Exported, client: Client, tmp_path: Path
    ) -> None:
        audit_id = audit_of(exported)
        body = {"action": "edit", "label": "pos", "indices": [9]}
        assert client.preview(audit_id, body).num_samples == 1
        edited = client.decide(audit_id, {**body, "reviewer": "anna"})
        dropped = client.decide(audit_id, {"action": "drop", "indices": [0, 1]})
        assert [batch.id for batch in client.decisions(audit_id)] == [dropped.id, edited.id]
        assert client.undo(audit_id, dropped.id).undone_at is not None
        assert client.get(audit_id).num_decided == 1
        assert client.precision(audit_id).at[0].num_wrong == 1
        assert client.suspects_summary(audit_id, decision="none").num_matching == 9
        (decided,) = client.suspects(audit_id, decision=["edit", "drop"])
        assert decided.decision is not None
        assert (decided.index, decided.decision.label) == (9, "pos")
        path = tmp_path / "clean.csv"
        assert winnow("export", audit_id, "--apply", "decisions", "-o", path).exit_code == 0
        expected = [row.copy() for row in ROWS]
        expected[9]["label"] = "pos"
        assert path.read_bytes().decode() == as_csv(expected)

    def test_a_deleted_upload_is_said(
        self, winnow: Winnow, exported: Exported, client: Client, tmp_path: Path
    ) -> None:
        client.delete_dataset(exported.dataset_id)
        result = winnow("export", audit_of(exported), "--apply", "drop", "-o", tmp_path / "a.csv")
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        assert list(tmp_path.glob("a.csv*")) == []

    def test_options_that_do_not_go_together(
        self, winnow: Winnow, exported: Exported, tmp_path: Path
    ) -> None:
        audit_id = audit_of(exported)
        unnamed = winnow("export", audit_id, "-o", tmp_path / "mine.tsv")
        assert (unnamed.exit_code, "end it in .parquet" in unnamed.stderr) == (2, True)
        both = winnow("export", audit_id, "--apply", "drop", "--format", "csv")
        assert (both.exit_code, "keeps the format" in both.stderr) == (2, True)
        nowhere = winnow("export", audit_id, "-o", tmp_path / "none" / "mine.csv")
        assert (nowhere.exit_code, "No such file" in nowhere.stderr) == (2, True)


class TestRank:
    def test_another_ranking_is_asked_for(
        self, winnow: Winnow, engine: Engine, settings: Settings, client: Client
    ) -> None:
        audit = make_finished_audit(engine, settings)
        result = winnow("rank", audit.id, "--estimator", "grad_cosine", "--layers", "CL", *RANK)
        assert result.exit_code == 0, result.output
        ranking = client.ranking(audit.id, result.stdout.strip())
        assert ranking.request["layers"] == "CL"
        assert f"--ranking {ranking.id}" in result.stderr

    def test_it_is_read_by_its_id(self, winnow: Winnow, engine: Engine, settings: Settings) -> None:
        audit = make_finished_audit(engine, settings)
        later = make_ranking(engine, audit, settings=settings)
        found = winnow("suspects", audit.id, "--ranking", later.id, "--json").stdout
        assert [suspect["index"] for suspect in json.loads(found)] == [*range(10)]

    def test_of_an_expired_audit_it_says_so(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        with transaction(engine) as session:
            stored = session.get_one(Audit, audit.id)
            stored.finished_at = stored.influence_deleted_at = long_ago()
        result = winnow("rank", audit.id, "--estimator", "grad_cosine")
        assert result.exit_code == 2
        assert "influence files of this audit were deleted" in result.stderr

    def test_what_the_audit_did_not_compute_is_said(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        result = winnow("rank", audit.id, "--estimator", "datainf", "--layers", "all", *RANK)
        assert (result.exit_code, "did not compute datainf" in result.stderr) == (2, True)


class TestReaching:
    """Where the service is, and what is said when it is not there."""

    def test_nobody_there_is_3(self, winnow: Winnow) -> None:
        for place in (("--url", "http://127.0.0.1:1"), ()):
            verb = ("--url", "http://127.0.0.1:1") if not place else ()
            result = winnow(*verb, "audit", "list", *place)
            assert result.exit_code == 3
            assert "Is the service running there" in result.stderr

    def test_an_address_that_is_none_is_2(self, winnow: Winnow) -> None:
        result = winnow("audit", "list", "--url", "localhost:8000")
        assert result.exit_code == 2
        assert "Traceback" not in result.output

    def test_a_missing_key_says_how_to_pass_one(self, winnow: Winnow) -> None:
        result = winnow("audit", "list", "--api-key", "wnw_wrong")
        assert result.exit_code == 2
        assert "WINNOW_API_KEY" in result.stderr


class TestDoctor:
    def test_what_works_and_what_does_not(self, winnow: Winnow) -> None:
        """No worker runs in this test."""
        result = winnow("doctor", "--json")
        assert result.exit_code == 1
        found = {each["name"]: each for each in json.loads(result.stdout)["findings"]}
        assert found["api"]["status"] == "ok"
        assert found["key"]["status"] == "ok"
        assert found["client"]["status"] == "ok"
        assert found["its database"]["status"] == "ok"
        assert found["its worker"]["status"] == "fail"
        assert found["its worker"]["advice"]

    def test_nobody_there(self, winnow: Winnow) -> None:
        result = winnow("doctor", "--url", "http://127.0.0.1:1")
        assert result.exit_code == 1
        assert "winnow serve" in result.stdout

    def test_a_wrong_key(self, winnow: Winnow) -> None:
        result = winnow("doctor", "--api-key", "wnw_wrong")
        assert "--api-key" in result.stdout
