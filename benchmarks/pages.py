"""How long the review page takes on an audit of a million ranked samples, deep in the list.

The rows are made by the database, in an embedded server in a temporary folder. Every page is asked
for over HTTP as a browser asks; what is told is the median of several calls, the server's and the
client's time together.

    .venv/bin/python -m benchmarks.pages [--rows 1000000] [--calls 7]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, text

from app.audits.models import Audit, AuditState, Ranking, RankingState
from app.audits.schemas import AuditRequest
from app.db import make_engine, new_id, transaction
from app.embedded import embedded_postgres
from app.jobs import make_celery
from app.main import create_app
from app.migrate import migrate
from app.settings import Settings
from app.work.states import enter_state, finish

GROUPS = ["all", "00", "01", "02", "03", "04", "05", "CL"]
REQUEST: dict[str, Any] = {
    "model": {"reference": "hf://org/model@main"},
    "train": {"reference": "hf://datasets/org/texts@main?split=train"},
    "validation": {"reference": "hf://datasets/org/texts@main?split=validation"},
    "fine_tune": {"epochs": 1},
    "ranking": {"estimator": "grad_cosine", "layers": "all", "aggregation": "rank"},
}
TRAINING = """
INSERT INTO training_samples (audit_id, sample_index, text, given_label, predicted_label,
    predicted_probability, given_probability, loss, is_noisy)
SELECT :audit_id, i, 'review ' || i || repeat(' the film was long and ' || i % 977, 8),
    (ARRAY['neg', 'pos'])[1 + i % 2], 'pos', 0.9, 0.1, 1.5, i % 7 = 0
FROM generate_series(0, :rows - 1) AS i"""
RANKED = """
INSERT INTO ranked_samples (ranking_id, rank, sample_index, given_label, score, flagged,
    noise_probability, suggested_label, suggested_probability, group_scores, group_ranks,
    harmed_validation, harmed_influence, helped_validation, helped_influence)
SELECT :ranking_id, i, j, (ARRAY['neg', 'pos'])[1 + j % 2], i / 1e5 - 5, i < :rows / 10,
    1 - i::float8 / :rows, (ARRAY['neg', 'pos'])[1 + (j / 3) % 2], 0.8,
    array_fill(0.5::real, ARRAY[8]), ARRAY[i, i, i / 2, i / 3, i, i / 2, i, i],
    '{}', '{}', '{}', '{}'
FROM (
    SELECT i, (i::bigint * 7919 % :rows)::int AS j FROM generate_series(0, :rows - 1) AS i
) AS t"""
PAGES = {
    "first page": "",
    "page at 1/2": "?from_rank={half}",
    "page at the end": "?from_rank={last}",
    "page before the end": "?before_rank={last}",
    "label, at 1/2": "?label=pos&from_rank={half}",
    "label and suggestion, at 1/2": "?label=pos&suggested_label=neg&from_rank={half}",
    "score up to, page before": "?max_score=2&before_rank={half}",
    "P(wrong) from 0.3, at 1/2": "?min_noise_probability=0.3&from_rank={half}",
    "undecided, at 1/2": "?decision=none&from_rank={half}",
    "search that finds many, at 1/2": "?search=LONG+AND+77&from_rank={half}",
    "search that finds one": "?search=review+{last}+",
    "search that finds nothing": "?search=zebra",
    "evidence of a sample": "/samples/{half}?part=true",
}


def make_audit(engine: Engine, rows: int) -> str:
    """Insert a finished audit of `rows` samples."""
    request = AuditRequest.model_validate(REQUEST).stored()
    audit = Audit(id=new_id("aud"), tenant="default", request=request, state_times={}, version=0)
    ranking_id = new_id("rnk")
    summary = {
        "num_flagged": rows // 10,
        "warnings": [],
        "files": {},
        "detection": {"ndr_10": 0.5, "ndr_20": 0.7, "ndr_30": 0.8, "auc_ndr": 0.9},
        "layer_groups": {name: [name] for name in GROUPS},
        "group_order": GROUPS,
        "layer_group_order": GROUPS,
        "configurations": [],
    }
    ranking = Ranking(
        id=ranking_id,
        audit_id=audit.id,
        tenant="default",
        is_own=True,
        specification=request["ranking"],
        flag=request["flag"],
        state=RankingState.SUCCEEDED,
        progress=1.0,
        finished_at=func.now(),
        summary=summary,
        folder=Ranking.folder_of(ranking_id),
    )
    enter_state(audit, AuditState.QUEUED)
    with transaction(engine) as session:
        session.add(audit)
        session.flush()
        session.add(ranking)
        session.flush()
        session.execute(text(TRAINING), {"audit_id": audit.id, "rows": rows})
        session.execute(text(RANKED), {"ranking_id": ranking_id, "rows": rows})
        audit.num_train, audit.num_validation, audit.progress = rows, 0, 1.0
        audit.summary = {**summary, "labels": ["neg", "pos"], "ranking_id": ranking_id}
        finish(audit, AuditState.SUCCEEDED)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    return audit.id


def measure(client: TestClient, path: str, calls: int) -> tuple[float, float]:
    """Return milliseconds of the first call, and the median of the others."""
    times = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        answer = client.get(path)
        times.append(1000 * (time.perf_counter() - start))
        if not answer.is_success:
            raise SystemExit(f"{path}: {answer.status_code} {answer.text[:500]}")
    return times[0], statistics.median(times[1:])


def main() -> None:
    """Make the audit, ask for its pages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, embedded_postgres(Path(folder)) as url:
        settings = Settings(
            database_url=url,
            broker_url="redis://127.0.0.1:1/0",
            data_dir=Path(folder),
            require_keys=False,
        )
        engine = make_engine(settings.require_database_url())
        migrate(engine)
        audit_id = make_audit(engine, options.rows)
        api = create_app(settings, engine, make_celery(settings))
        client = TestClient(api, base_url="http://127.0.0.1")
        places = {"half": options.rows // 2, "last": options.rows - 60}
        print(f"{options.rows:,} rows; milliseconds: first call, median of {options.calls}")
        for name, query in PAGES.items():
            path = f"/audits/{audit_id}{query.format(**places)}"
            first, median = measure(client, path, options.calls)
            print(f"{name:32} {first:8.0f} {median:8.0f}", flush=True)
        first, median = measure(client, f"/audits/{audit_id}/overview", options.calls)
        print(f"{'pictures: counted, then kept':32} {first:8.0f} {median:8.0f}", flush=True)
        engine.dispose()


if __name__ == "__main__":
    main()
