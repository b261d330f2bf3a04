"""`winnow audit` against the real application: what is asked, what is answered, exit codes."""

import json
from pathlib import Path

import pytest
import yaml
from sqlalchemy import Engine
from typer.testing import Result
from winnow import Client

from app.audits.models import AuditState
from app.settings import Settings
from tests.client.conftest import Winnow
from tests.factories import (
    CSV_TABLE,
    make_audit,
    make_ended_audit,
    make_finished_audit,
    request_body,
)

HUB = "hf://org/model@main"
TRUSTED = "hf://datasets/org/texts@main?split=validation"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(CSV_TABLE)
    return path


class TestRun:
    def test_options_and_local_files_become_a_request(
        self, winnow: Winnow, client: Client, table: Path, tmp_path: Path
    ) -> None:
        trusted = tmp_path / "trusted.csv"
        trusted.write_text(CSV_TABLE * 2)
        result = winnow(
            *("audit", "run", "--model", HUB, "--train", table, "--validation", trusted),
            *("--epochs", "2", "--estimator", "grad_cosine", "--layers", "all"),
            *("--aggregation", "rank", "--flag", "5%", "--plant-noise", "20%", "--name", "nightly"),
            *("--metadata", "run=7", "--set", "fine_tune.rank=8", "--set", "max_tokens=64"),
        )
        assert result.exit_code == 0, result.stderr
        audit = client.get(result.stdout.strip())
        train, validation = (audit.request[name]["reference"] for name in ("train", "validation"))
        assert {each.name: each.reference for each in client.datasets()} == {
            "train.csv": train,
            "trusted.csv": validation,
        }
        assert (audit.request["fine_tune"]["epochs"], audit.request["fine_tune"]["rank"]) == (2, 8)
        assert audit.request["ranking"]["estimator"] == "grad_cosine"
        assert audit.request["flag"]["fraction"] == 0.05
        assert audit.request["plant_noise"]["fraction"] == 0.2
        assert audit.request["max_tokens"] == 64
        assert audit.metadata == {"name": "nightly", "run": "7"}
        assert "winnow audit show" in result.stderr

    def test_the_same_content_is_uploaded_once(
        self, winnow: Winnow, client: Client, table: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy.csv"
        copy.write_text(CSV_TABLE)
        options = ("audit", "run", "--model", HUB, "--train", table, "--validation", copy, "--json")
        first = json.loads(winnow(*options, "--fine-tune").stdout)
        again = winnow(*options, "--fine-tune")
        assert "was uploaded before" in again.stderr
        assert json.loads(again.stdout)["request"]["train"] == first["request"]["train"]
        assert first["request"]["train"] == first["request"]["validation"]
        assert len(list(client.datasets())) == 1

    def test_other_columns_make_it_another_upload(
        self, winnow: Winnow, client: Client, tmp_path: Path
    ) -> None:
        path = tmp_path / "two.csv"
        path.write_text("text,label,review\na,x,b\nc,y,d\n")
        options = ("audit", "run", "--model", HUB, "--train", path, "--validation", TRUSTED)
        for columns in ((), ("--text-column", "review"), ("--text-column", "review"), ()):
            assert winnow(*options, "--fine-tune", *columns).exit_code == 0
        assert [each.columns["text"] for each in client.datasets()] == ["review", "text"]

    def test_a_request_file_lies_under_the_options(
        self, winnow: Winnow, table: Path, tmp_path: Path
    ) -> None:
        body = request_body(train={"reference": str(table)}, max_tokens=32, flag={"count": 3})
        for name, write in (("request.json", json.dumps), ("request.yaml", yaml.safe_dump)):
            path = tmp_path / name
            path.write_text(write(body))
            result = winnow("audit", "run", "--request", path, "--flag", "auto", "--json")
            assert result.exit_code == 0, result.stderr
            request = json.loads(result.stdout)["request"]
            assert (request["max_tokens"], request["flag"]) == (32, "auto")
            assert request["train"]["reference"].startswith("upload:")

    def test_a_model_folder_becomes_a_reference(
        self, winnow: Winnow, table: Path, tmp_path: Path
    ) -> None:
        """Whether the service may read it, it says itself, and where to allow it."""
        folder = tmp_path / "model"
        folder.mkdir()
        result = winnow("audit", "run", "--model", folder, "--train", table, "--fine-tune")
        assert result.exit_code == 2
        assert folder.as_uri() in result.stderr or "WINNOW_FILE_ROOTS" in result.stderr

    def test_one_key_is_one_audit(self, winnow: Winnow, table: Path) -> None:
        options = ("audit", "run", "--model", HUB, "--train", table, "--validation", TRUSTED)
        ids = {winnow(*options, "--fine-tune", "--idempotency-key", "k").stdout for _ in range(2)}
        assert len(ids) == 1


class TestRefusals:
    """One clear sentence, exit code 2, no traceback and nothing submitted."""

    def refused(self, result: Result, *words: str) -> None:
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        for word in words:
            assert word in result.stderr

    def test_a_file_that_is_no_table(self, winnow: Winnow, tmp_path: Path) -> None:
        path = tmp_path / "photo.csv"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
        self.refused(winnow("audit", "run", "--model", HUB, "--train", path), "was not taken")

    def test_a_file_that_is_not_there(self, winnow: Winnow) -> None:
        result = winnow("audit", "run", "--model", HUB, "--train", "nowhere.csv")
        self.refused(result, "there is no file 'nowhere.csv'", "hf://datasets")

    def test_a_model_that_is_not_there(self, winnow: Winnow, table: Path) -> None:
        result = winnow("audit", "run", "--model", "org/model", "--train", table)
        self.refused(result, "there is no folder 'org/model'", "hf://owner/name@revision")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--wait", "--fail-over", "much"), "'much' is no share"),
            (("--fail-over", "2%"), "--fail-over needs --wait"),
            (("--metadata", "seven"), "--metadata takes key=value"),
            (("--set", "=1"), "--set takes key=value"),
            (("--set", "max_tokens=many"), "#/max_tokens"),
            (("--estimator", "oracles"), "#/ranking/estimator"),
            (("--epochs", "several"), "epochs"),
            (("--flag", "300%"), "is no share"),
        ],
    )
    def test_options_that_cannot_be(
        self, winnow: Winnow, options: tuple[str, ...], words: str
    ) -> None:
        result = winnow("audit", "run", "--model", HUB, "--train", TRUSTED, *options)
        self.refused(result, words)

    def test_nothing_at_all_names_what_is_missing(self, winnow: Winnow) -> None:
        self.refused(winnow("audit", "run"), "#/model", "#/train")

    @pytest.mark.parametrize("text", ["[1, 2]", "{", "model"])
    def test_a_request_file_that_cannot_be_read(
        self, winnow: Winnow, tmp_path: Path, text: str
    ) -> None:
        path = tmp_path / "request.json"
        path.write_text(text)
        self.refused(winnow("audit", "run", "--request", path), "request.json")
        self.refused(winnow("audit", "run", "--request", tmp_path / "none.json"), "none.json")

    def test_json_has_the_problem_too(self, winnow: Winnow) -> None:
        result = winnow("--json", "audit", "run")
        self.refused(result)
        error = json.loads(result.stdout)["error"]
        assert error["status"] == 422
        assert {"#/model", "#/train"} <= {item["pointer"] for item in error["errors"]}


class TestOutcome:
    """What `show` and `wait` say of an audit that has ended, and the exit codes of a gate."""

    @pytest.mark.parametrize(("limit", "code"), [("10%", 1), ("0.2", 0)])
    def test_a_gate(
        self, winnow: Winnow, engine: Engine, settings: Settings, limit: str, code: int
    ) -> None:
        """Two of ten samples are flagged."""
        audit = make_finished_audit(engine, settings)
        words = "Too many suspects" if code else "Clean"
        for verb in (("audit", "show", audit.id, "--wait"), ("audit", "wait", audit.id)):
            result = winnow(*verb, "--fail-over", limit)
            assert result.exit_code == code, result.output
            assert "2 of 10 samples are flagged (20.0%)" in result.stdout
            assert words in result.stderr
            told = json.loads(winnow(*verb, "--fail-over", limit, "--json").stdout)
            assert told["gate"]["passed"] is (code == 0)

    def test_a_fixed_flag_is_no_gate(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        result = winnow("audit", "wait", audit.id, "--fail-over", "50%")
        assert "leave `flag` to auto" in result.stderr

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            (AuditState.FAILED, "failed: Use another model."),
            (AuditState.CANCELLED, "was cancelled"),
        ],
    )
    def test_an_audit_that_did_not_succeed(
        self, winnow: Winnow, engine: Engine, state: AuditState, words: str
    ) -> None:
        audit = make_ended_audit(engine, state, message="Use another model.")
        result = winnow("audit", "wait", audit.id, "--fail-over", "50%")
        assert result.exit_code == 3
        assert words in result.stderr
        assert winnow("audit", "show", audit.id).exit_code == 0

    def test_a_running_audit_is_shown_and_followed(
        self, winnow: Winnow, engine: Engine, client: Client
    ) -> None:
        running = make_audit(engine)
        shown = winnow("audit", "show", running.id)
        assert "queued" in shown.stdout
        assert HUB in shown.stdout
        assert winnow("audit", "show", running.id, "--fail-over", "2%").exit_code == 2
        assert winnow("audit", "cancel", running.id).exit_code == 0
        assert client.get(running.id).cancel_requested_at is not None

    def test_an_audit_that_is_none(self, winnow: Winnow) -> None:
        for verb in ("show", "wait", "cancel"):
            result = winnow("audit", verb, "aud_none")
            assert result.exit_code == 2
            assert "There is no audit 'aud_none'" in result.stderr


class TestListAndDelete:
    def test_the_list_is_the_newest_first(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audits = [make_audit(engine), make_ended_audit(engine, AuditState.FAILED)]
        audits.append(make_finished_audit(engine, settings))
        listed = winnow("audit", "list").stdout
        assert [line.split()[0] for line in listed.splitlines()[1:]] == [
            audit.id for audit in reversed(audits)
        ]
        assert "2 of 10" in listed
        newest = json.loads(winnow("audit", "list", "--limit", "1", "--json").stdout)
        assert [each["id"] for each in newest] == [audits[-1].id]
        failed = json.loads(winnow("audit", "list", "--state", "failed", "--json").stdout)
        assert [each["id"] for each in failed] == [audits[1].id]
        assert winnow("audit", "list", "--state", "lost").exit_code == 2

    def test_no_audits_is_said(self, winnow: Winnow) -> None:
        assert "There are no audits" in winnow("audit", "list").stderr
        assert json.loads(winnow("audit", "list", "--json").stdout) == []

    def test_deleting_asks_first_or_wants_yes(
        self, winnow: Winnow, engine: Engine, settings: Settings
    ) -> None:
        audit = make_finished_audit(engine, settings)
        refused = winnow("audit", "delete", audit.id)
        assert refused.exit_code == 2
        assert "--yes" in refused.stderr
        assert winnow("audit", "delete", audit.id, "--yes").exit_code == 0
        gone = winnow("suspects", audit.id)
        assert gone.exit_code == 2
        assert "There is no audit" in gone.stderr

    def test_another_tenants_audit_does_not_exist(self, winnow: Winnow, engine: Engine) -> None:
        theirs = make_audit(engine, tenant="somebody-else")
        assert winnow("audit", "show", theirs.id).exit_code == 2
        assert "There are no audits" in winnow("audit", "list").stderr
