"""The client against the real application on the real servers, over HTTP."""

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine
from winnow import (
    AuditRequest,
    Client,
    Columns,
    DatasetSource,
    DownloadDamaged,
    Flag,
    NotDoneInTime,
    RankingRequest,
    WinnowError,
)

from app.audits.folders import audit_folder
from app.audits.models import AuditState
from app.catalogue import AGGREGATIONS, ESTIMATORS
from app.settings import Settings
from tests.factories import (
    CSV_TABLE,
    GROUPS,
    make_audit,
    make_ended_audit,
    make_finished_audit,
    make_ranking,
    request_body,
)


def test_an_upload_becomes_a_reference(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(CSV_TABLE)
    by_path = client.upload_dataset(path)
    by_bytes = client.upload_dataset(CSV_TABLE.encode(), name="again", file_format="csv")
    assert by_path.reference == f"upload:{by_path.id}"
    assert (by_path.name, by_path.num_rows) == ("train.csv", 3)
    assert (by_bytes.name, by_bytes.sha256) == ("again", by_path.sha256)


def test_an_upload_may_name_its_columns(client: Client) -> None:
    table = b"review,verdict,wrong\nfine,good,0\ndull,bad,1\n"
    columns = Columns(text="review", label="verdict", noise="wrong")
    dataset = client.upload_dataset(table, columns=columns, file_format="csv")
    named = {field: name for field, name in dataset.columns.items() if name is not None}
    assert named == {"text": "review", "label": "verdict", "noise": "wrong"}
    assert dataset.summary["num_noisy"] == 1


def test_the_service_tells_prompts_and_chats_by_their_names(client: Client) -> None:
    prompts = client.upload_dataset(b"prompt,completion\na,b\n", file_format="csv")
    assert prompts.summary["kind"] == "completion"
    chat = b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    lines = b'{"messages": ' + chat + b"}\n"
    assert client.upload_dataset(lines).summary["kind"] == "chat"
    named = client.upload_dataset(
        lines.replace(b"messages", b"m"), columns=Columns(messages="m"), file_format="jsonl"
    )
    assert named.columns["messages"] == "m"


def test_suspects_of_a_causal_language_model_have_no_labels(
    client: Client, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings, has_labels=False)
    first, second, *_ = client.suspects(audit.id)
    assert (first.given_label, first.predicted_label) == (None, None)
    assert (first.non_finite, second.non_finite) == (True, False)
    results = client.get(audit.id).results
    assert results is not None
    assert results.validation_accuracy is None
    assert client.sample(audit.id, 9).harms_most == []


def test_a_refused_upload_says_where(client: Client) -> None:
    with pytest.raises(WinnowError) as caught:
        client.upload_dataset(b"text,label\n,pos\n", file_format="csv")
    assert caught.value.status == 422
    assert "row 1" in str(caught.value)
    assert caught.value.errors


def test_a_typed_request_and_its_json_are_the_same(client: Client) -> None:
    dataset = client.upload_dataset(CSV_TABLE.encode(), file_format="csv")
    source = {"reference": dataset.reference}
    body = request_body(train=source, validation=source)
    typed = AuditRequest.model_validate(body)
    assert typed.train == DatasetSource(reference=dataset.reference)
    first, second = client.submit(body), client.submit(typed)
    assert first.id != second.id
    assert first.state == "queued"
    assert first.request == second.request


def test_one_key_is_one_audit(client: Client) -> None:
    first = client.submit(request_body(), idempotency_key="nightly")
    assert client.submit(request_body(), idempotency_key="nightly").id == first.id
    with pytest.raises(WinnowError, match="another body"):
        client.submit(request_body(seed=1), idempotency_key="nightly")


def test_a_misspelt_field_is_named(client: Client) -> None:
    with pytest.raises(WinnowError) as caught:
        client.submit(request_body(fine_tune={"epoch": 3}))
    assert [item.pointer for item in caught.value.errors] == ["#/fine_tune/epoch"]


def test_waiting_ends_with_the_audit_whichever_way(client: Client, engine: Engine) -> None:
    failed = make_ended_audit(engine, AuditState.FAILED, message="Use another model.")
    seen: list[str] = []
    audit = client.wait(failed.id, progress=lambda now: seen.append(now.state))
    assert seen == ["failed"]
    assert audit.error is not None
    assert audit.error.message == "Use another model."


def test_an_unchanged_audit_is_not_sent_again(client: Client, engine: Engine) -> None:
    """The service's ETag and the client's If-None-Match fit: the caller hears of it once."""
    running = make_audit(engine)
    seen: list[str] = []
    with pytest.raises(WinnowError, match="still running"):
        client.wait(
            running.id, progress=lambda now: seen.append(now.state), poll_seconds=0.05, timeout=0.3
        )
    assert seen == ["queued"]


def test_a_queued_audit_can_be_cancelled(client: Client, engine: Engine) -> None:
    running = make_audit(engine)
    assert client.cancel(running.id).cancel_requested_at is not None
    assert client.get(running.id).id == running.id


def test_suspects_come_over_all_pages_in_order(
    client: Client, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings, num_train=25)
    suspects = [*client.suspects(audit.id, page_size=10)]
    assert [suspect.rank for suspect in suspects] == [*range(25)]
    assert suspects[0].text == "sample 24"
    assert suspects == [*client.suspects(audit.id)]


def test_suspects_are_filtered_by_the_service(
    client: Client, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings, num_train=25)

    def ranks(**filters: bool | str | float) -> list[int]:
        return [s.rank for s in client.suspects(audit.id, page_size=3, **filters)]  # type: ignore[arg-type]

    assert ranks(flagged=True) == [0, 1]
    assert ranks(flagged=False) == [*range(2, 25)]
    assert ranks(label="pos") == [*range(0, 25, 2)]
    assert ranks(min_score=0.95, max_score=1.25) == [10, 11, 12]
    assert ranks(flagged=True, label="neg") == [1]


def test_pages_are_fetched_as_they_are_needed(
    client: Client, engine: Engine, settings: Settings
) -> None:
    """Nothing is asked for before the first sample is taken."""
    suspects = client.suspects("aud_unknown")
    with pytest.raises(WinnowError, match="There is no audit"):
        next(suspects)


def test_one_sample_comes_with_the_evidence(
    client: Client, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings)
    sample = client.sample(audit.id, 9)
    assert (sample.rank, sample.text) == (0, "sample 9")
    assert [standing.layer_group for standing in sample.layer_groups] == [*GROUPS]
    assert [(of.index, of.influence) for of in sample.harms_most] == [(2, -0.5), (0, -0.25)]
    assert [of.text for of in sample.helps_most] == ["validation 1"]
    assert "lowest score is the most suspect" in sample.score_order


def test_the_table_of_layers(client: Client, engine: Engine, settings: Settings) -> None:
    audit = make_finished_audit(engine, settings)
    layers = client.layers(audit.id)
    assert layers.layer_groups == GROUPS
    assert [row.layer_group for row in layers.data] == [*GROUPS]
    assert layers.data[0].detection is not None


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_download_is_the_file_of_the_results(
    client: Client, engine: Engine, settings: Settings, tmp_path: Path, ending: str
) -> None:
    audit = make_finished_audit(engine, settings)
    path = client.download(audit.id, tmp_path / f"suspects.{ending}")
    results = client.get(audit.id).results
    assert results is not None
    (file,) = [of for name, of in results.files.items() if name == ending]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    if ending == "parquet":
        assert pq.read_table(path)["rank"].to_pylist() == [*range(10)]


COSINE = {"estimator": "grad_cosine", "layers": "CL", "aggregation": "rank"}


def test_another_ranking_from_asking_to_its_file(
    client: Client, engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    audit = make_finished_audit(engine, settings)
    asked = client.rank(audit.id, RankingRequest(**COSINE, flag=Flag(count=2)))
    assert (asked.state, asked.is_own, asked.request["flag"]["count"]) == ("queued", False, 2)
    with pytest.raises(NotDoneInTime, match=asked.id):
        client.wait_for_ranking(audit.id, asked.id, poll_seconds=0.01, timeout=0.05)
    client.delete_ranking(audit.id, asked.id)
    later = make_ranking(engine, audit, settings=settings)
    done = client.wait_for_ranking(audit.id, later.id, timeout=10)
    assert done.results is not None
    assert client.ranking(audit.id, later.id) == done
    listed = list(client.rankings(audit.id, page_size=1))
    assert [(ranking.id, ranking.is_own) for ranking in listed] == [
        (audit.summary["ranking_id"], True),
        (later.id, False),
    ]
    assert [row.index for row in client.suspects(audit.id, ranking_id=later.id)] == [*range(10)]
    assert [row.index for row in client.suspects(audit.id)] == [*reversed(range(10))]
    assert client.sample(audit.id, 3, ranking_id=later.id).rank == 3
    assert client.sample(audit.id, 3).rank == 6
    assert list(client.layers(audit.id, ranking_id=later.id).layer_groups) == ["all"]
    path = client.download(audit.id, tmp_path / "a.csv", ranking_id=later.id)
    file = done.results.files["csv"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_the_same_key_asks_for_a_ranking_once(
    client: Client, engine: Engine, settings: Settings
) -> None:
    audit = make_finished_audit(engine, settings)
    ids = {client.rank(audit.id, COSINE, idempotency_key="k").id for _ in range(2)}
    assert len(ids) == 1
    with pytest.raises(WinnowError, match="did not compute datainf"):
        client.rank(audit.id, {"estimator": "datainf"})


def test_a_file_that_changed_on_the_server_is_refused(
    client: Client, engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    """The service promises the SHA-256 of the file that it wrote; rotten bytes do not pass."""
    audit = make_finished_audit(engine, settings)
    folder = audit_folder(settings.data_dir, audit.id) / "results"
    stored = folder / audit.summary["ranking_id"] / "suspects.csv"
    stored.write_bytes(stored.read_bytes().replace(b"sample 9", b"sample 8"))
    to = tmp_path / "to"
    to.mkdir()
    with pytest.raises(DownloadDamaged):
        client.download(audit.id, to / "suspects.csv")
    assert list(to.iterdir()) == []


def test_the_catalogue(client: Client) -> None:
    assert [estimator.name for estimator in client.estimators()] == list(ESTIMATORS)
    assert [aggregation.name for aggregation in client.aggregations()] == list(AGGREGATIONS)


def test_without_a_key_the_service_says_how_to_send_one(url: str) -> None:
    with Client(url) as client, pytest.raises(WinnowError, match="Authorization") as caught:
        client.estimators()
    assert caught.value.status == 401


def test_another_tenants_audit_does_not_exist(client: Client, engine: Engine) -> None:
    theirs = make_audit(engine, tenant="somebody-else")
    for call in (client.get, client.cancel, client.layers):
        with pytest.raises(WinnowError) as caught:
            call(theirs.id)
        assert caught.value.status == 404
