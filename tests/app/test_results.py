"""What a finished audit answers: the ranking by page and by file, one sample, the layers."""

import hashlib
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.audits.models import Audit, AuditState
from app.db import transaction
from app.settings import Settings
from tests.factories import make_audit, make_ended_audit, make_finished_audit

RESULT_PATHS = ("suspects", "suspects.csv", "suspects.parquet", "samples/0", "layers")


class TestBeforeSuccess:
    @pytest.mark.parametrize("path", RESULT_PATHS)
    def test_a_running_audit_says_how_far_it_is(
        self, client: TestClient, engine: Engine, path: str
    ) -> None:
        audit = make_audit(engine)
        response = client.get(f"/v1/audits/{audit.id}/{path}")
        assert response.status_code == 409
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["Retry-After"] == "2"
        assert "is queued and has no results yet" in response.json()["detail"]
        assert response.json()["state"] == "queued"

    @pytest.mark.parametrize("path", RESULT_PATHS)
    def test_a_failed_audit_says_why(self, client: TestClient, engine: Engine, path: str) -> None:
        audit = make_ended_audit(engine, AuditState.FAILED, message="Name another model.")
        response = client.get(f"/v1/audits/{audit.id}/{path}")
        assert response.status_code == 409
        assert "Name another model." in response.json()["detail"]
        assert "Retry-After" not in response.headers

    def test_a_cancelled_audit_says_so(self, client: TestClient, engine: Engine) -> None:
        audit = make_ended_audit(engine, AuditState.CANCELLED)
        problem = client.get(f"/v1/audits/{audit.id}/suspects").json()
        assert problem["detail"] == "The audit was cancelled and has no results."


class TestSuspects:
    def ranks(self, client: TestClient, audit: Audit, **query: Any) -> list[int]:
        response = client.get(f"/v1/audits/{audit.id}/suspects", params=query)
        assert response.status_code == 200, response.text
        return [suspect["rank"] for suspect in response.json()["data"]]

    def test_the_most_suspect_is_first(self, client: TestClient, finished: Audit) -> None:
        page = client.get(f"/v1/audits/{finished.id}/suspects?limit=1").json()
        assert page["ranking_id"] == finished.summary["ranking_id"]
        assert "lowest score is the most suspect" in page["score_order"]
        assert page["data"] == [
            {
                "rank": 0,
                "index": 9,
                "text": "sample 9",
                "text_pair": None,
                "given_label": "neg",
                "predicted_label": "neg",
                "predicted_probability": 0.75,
                "given_probability": 0.25,
                "loss": 1.5,
                "score": 0.0,
                "flagged": True,
                "noise_probability": None,
                "suggested_label": None,
                "suggested_probability": None,
                "is_noisy": True,
                "non_finite": False,
                "decision": None,
            }
        ]

    def test_filters(self, client: TestClient, finished: Audit) -> None:
        assert self.ranks(client, finished, flagged="true") == [0, 1]
        assert self.ranks(client, finished, flagged="false") == [*range(2, 10)]
        assert self.ranks(client, finished, label="pos") == [1, 3, 5, 7, 9]
        assert self.ranks(client, finished, label="maybe") == []
        assert self.ranks(client, finished, label="pos", min_score=0.5) == [5, 7, 9]

    def test_a_score_that_was_read_is_its_own_bound(
        self, client: TestClient, finished: Audit
    ) -> None:
        """Scores have 32 bits; 0.1 as 64 bits is another number."""
        for rank in range(10):
            page = client.get(f"/v1/audits/{finished.id}/suspects").json()
            score = page["data"][rank]["score"]
            assert self.ranks(client, finished, min_score=score, max_score=score) == [rank]

    @pytest.mark.parametrize("score", ["nan", "inf", "1e39", "x"])
    def test_bounds_that_are_no_scores_are_refused(
        self, client: TestClient, finished: Audit, score: str
    ) -> None:
        url = f"/v1/audits/{finished.id}/suspects?min_score={score}"
        assert client.get(url).json()["errors"][0]["pointer"] == "query.min_score"

    @pytest.mark.parametrize("limit", [1, 3, 5, 10, 1000])
    def test_pages_join_without_gap_or_double(
        self, client: TestClient, finished: Audit, limit: int
    ) -> None:
        url, seen = f"/v1/audits/{finished.id}/suspects?limit={limit}&label=pos", []
        while url:
            response = client.get(url)
            seen += [suspect["rank"] for suspect in response.json()["data"]]
            url = response.links.get("next", {}).get("url", "")
            assert not url or "label=pos" in url
        assert seen == [1, 3, 5, 7, 9]

    @pytest.mark.parametrize("query", ["limit=0", "limit=1001", "cursor=ImEi", "cursor=%00"])
    def test_bad_pages_are_refused(self, client: TestClient, finished: Audit, query: str) -> None:
        response = client.get(f"/v1/audits/{finished.id}/suspects?{query}")
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"].startswith("query.")


class TestWithoutLabels:
    """An audit of a causal language model, without a validation set."""

    @pytest.fixture
    def audit(self, engine: Engine, settings: Settings) -> Audit:
        return make_finished_audit(engine, settings, has_labels=False)

    def test_the_results_say_what_there_is(self, client: TestClient, audit: Audit) -> None:
        answer = client.get(f"/v1/audits/{audit.id}").json()
        assert answer["request"]["validation"] is None
        assert answer["num_validation"] == 0
        results = answer["results"]
        assert results["labels"] == []
        assert results["validation_accuracy"] is None

    def test_suspects_have_no_labels(self, client: TestClient, audit: Audit) -> None:
        page = client.get(f"/v1/audits/{audit.id}/suspects").json()["data"]
        assert {suspect["given_label"] for suspect in page} == {None}
        assert {suspect["predicted_label"] for suspect in page} == {None}
        assert [suspect["rank"] for suspect in page if suspect["non_finite"]] == [0]
        assert client.get(f"/v1/audits/{audit.id}/suspects?label=pos").json()["data"] == []

    def test_a_sample_stands_alone(self, client: TestClient, audit: Audit) -> None:
        sample = client.get(f"/v1/audits/{audit.id}/samples/9").json()
        assert (sample["rank"], sample["non_finite"]) == (0, True)
        assert sample["harms_most"] == sample["helps_most"] == []


class TestWhatTheEngineReports:
    def test_an_older_summary_reports_nothing(self, client: TestClient, finished: Audit) -> None:
        results = client.get(f"/v1/audits/{finished.id}").json()["results"]
        names = ("num_non_finite", "num_non_finite_validation", "cancellation")
        more = ("projection", "preflight", "verification")
        assert [results[name] for name in (*names, *more)] == [None] * 6

    def test_everything_that_was_found(
        self, client: TestClient, engine: Engine, finished: Audit
    ) -> None:
        report = {
            "num_non_finite": 2,
            "num_non_finite_validation": 0,
            "cancellation": {"all": {"l1": 3.5, "l2": None}},
            "projection": {
                "dimension": 32,
                "spearman": 0.9,
                "num_pairs": 100,
                "by_group": {"all": 0.9, "CL": None},
            },
            "preflight": {"max_loss_error": 1e-7, "zero_modules": [], "warnings": []},
            "verification": {
                "fraction": 0.3,
                "seeds": [0, 1],
                "confidence": 0.9,
                "num_test": 50,
                "arms": [
                    {
                        "name": "filtered",
                        "ranking": None,
                        "num_train": 7,
                        "num_removed": 3,
                        "num_relabelled": 0,
                        "metrics": {"accuracy": {"mean": 0.75, "values": [0.75, None]}},
                        "against_full": {
                            "accuracy": {
                                "difference": 0.25,
                                "low": None,
                                "high": None,
                                "num_seeds": 1,
                                "sample_low": 0.1,
                                "sample_high": 0.4,
                            },
                            "macro_f1": None,
                        },
                    }
                ],
                "warnings": ["The arm filtered diverged with seed 1."],
            },
        }
        with transaction(engine) as session:
            audit = session.merge(finished)
            audit.summary = {**audit.summary, **report}
        results = client.get(f"/v1/audits/{finished.id}").json()["results"]
        assert {name: results[name] for name in report} == report


class TestDownloads:
    def url(self, audit: Audit, name: str = "csv") -> str:
        return f"/v1/audits/{audit.id}/suspects.{name}"

    @pytest.mark.parametrize(
        ("name", "media_type"),
        [
            ("parquet", "application/vnd.apache.parquet"),
            ("csv", "text/csv; charset=utf-8"),
            ("jsonl", "application/jsonl"),
        ],
    )
    def test_the_whole_ranking(
        self, client: TestClient, finished: Audit, name: str, media_type: str
    ) -> None:
        response = client.get(self.url(finished, name))
        assert response.status_code == 200
        assert response.headers["content-type"] == media_type
        assert response.headers["ETag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'
        assert response.headers["Winnow-Score-Order"].startswith("ascending")
        assert (
            f'filename="{finished.id}-suspects.{name}"' in response.headers["content-disposition"]
        )

    def test_the_parquet_file_can_be_read(
        self, client: TestClient, finished: Audit, tmp_path: Any
    ) -> None:
        (tmp_path / "a.parquet").write_bytes(client.get(self.url(finished, "parquet")).content)
        assert pq.read_table(tmp_path / "a.parquet")["rank"].to_pylist() == [*range(10)]

    def test_head_tells_the_size_without_the_file(
        self, client: TestClient, finished: Audit
    ) -> None:
        response = client.head(self.url(finished))
        assert response.content == b""
        size = finished.summary["files"]["csv"]["bytes"]
        assert response.headers["content-length"] == str(size)

    def test_a_known_file_is_not_sent_again(self, client: TestClient, finished: Audit) -> None:
        etag = client.get(self.url(finished)).headers["ETag"]
        response = client.get(self.url(finished), headers={"If-None-Match": etag})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["ETag"] == etag

    def test_a_broken_download_goes_on_where_it_was(
        self, client: TestClient, finished: Audit
    ) -> None:
        whole = client.get(self.url(finished))
        rest = client.get(
            self.url(finished),
            headers={"Range": "bytes=100-", "If-Range": whole.headers["ETag"]},
        )
        assert rest.status_code == 206
        assert rest.headers["content-range"] == f"bytes 100-{len(whole.content) - 1}/" + str(
            len(whole.content)
        )
        assert whole.content[:100] + rest.content == whole.content
        changed = client.get(
            self.url(finished), headers={"Range": "bytes=100-", "If-Range": '"other"'}
        )
        assert changed.status_code == 200

    @pytest.mark.parametrize("part", ["bytes=0-0", "bytes=-1", "bytes=0-1,3-4", "bytes=5-999999"])
    def test_parts(self, client: TestClient, finished: Audit, part: str) -> None:
        response = client.get(self.url(finished), headers={"Range": part})
        assert response.status_code == 206

    @pytest.mark.parametrize(
        "part", ["bytes=999999-", "bytes=4-1", "bytes=", "bytes=x-y", "rows=0-1", "bytes=-0", "x"]
    )
    def test_a_part_that_is_none_is_a_problem(
        self, client: TestClient, finished: Audit, part: str
    ) -> None:
        response = client.get(self.url(finished), headers={"Range": part})
        assert response.status_code == 416
        assert response.headers["content-type"] == "application/problem+json"
        size = finished.summary["files"]["csv"]["bytes"]
        assert response.headers["content-range"] == f"bytes */{size}"

    def test_an_unknown_format_is_refused(self, client: TestClient, finished: Audit) -> None:
        assert "'parquet', 'csv' or 'jsonl'" in client.get(self.url(finished, "xls")).text

    def test_a_file_that_is_gone_is_not_found(
        self, client: TestClient, finished: Audit, settings: Settings
    ) -> None:
        folder = settings.data_dir / "audits" / finished.id / "results"
        (folder / finished.summary["ranking_id"] / "suspects.csv").unlink()
        response = client.get(self.url(finished))
        assert response.status_code == 404
        assert "page by page" in response.json()["detail"]
