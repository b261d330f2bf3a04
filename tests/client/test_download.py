"""A download is the file that the service meant to send, or no file at all."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from starlette.responses import Response, StreamingResponse
from winnow import Client, DownloadDamaged, ServiceUnreachable, WinnowError

from app.audits.folders import audit_folder
from app.settings import Settings
from tests.client.answers import file, problem
from tests.client.conftest import ScriptedService
from tests.client.proxies import cutting_proxy
from tests.factories import CSV_TABLE, make_finished_audit

CONTENT = b'{"rank": 0}\n' * 10_000
HALF = len(CONTENT) // 2


def broken_off(content: bytes) -> Response:
    """Return a download that promises `content` and ends in its middle."""

    async def half() -> AsyncIterator[bytes]:
        yield content[: len(content) // 2]

    whole = file(content)
    headers = {"content-length": str(len(content)), "etag": whole.headers["etag"]}
    return StreamingResponse(half(), headers=headers)


def test_a_whole_file_is_saved(service: ScriptedService, tmp_path: Path) -> None:
    service.answers(file(CONTENT))
    with Client(service.url) as client:
        path = client.download("aud_1", tmp_path / "suspects.jsonl")
    assert path.read_bytes() == CONTENT
    assert service.requests[0].url.path == "/v1/audits/aud_1/suspects.jsonl"
    assert [entry.name for entry in tmp_path.iterdir()] == ["suspects.jsonl"]


@pytest.mark.parametrize("was_there", [b"an older ranking", None])
def test_a_damaged_file_is_refused(
    service: ScriptedService, tmp_path: Path, was_there: bytes | None
) -> None:
    """Nothing half written is left, and what stood there before still does."""
    path = tmp_path / "suspects.jsonl"
    if was_there is not None:
        path.write_bytes(was_there)
    service.answers(file(CONTENT[:-1] + b"?", etag_of=CONTENT))
    with Client(service.url) as client, pytest.raises(DownloadDamaged, match="was not saved"):
        client.download("aud_1", path)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [was_there] * bool(was_there)


@pytest.mark.parametrize("etag", [None, 'W/"0123"', '"17-abc"'])
def test_a_file_without_a_checksum_is_refused(
    service: ScriptedService, tmp_path: Path, etag: str | None
) -> None:
    service.answers(Response(CONTENT, headers={"etag": etag} if etag else None))
    with Client(service.url) as client, pytest.raises(DownloadDamaged, match="without a checksum"):
        client.download("aud_1", tmp_path / "suspects.csv")
    assert list(tmp_path.iterdir()) == []


class TestResume:
    """What came stays, and only the rest is asked for."""

    def partial(self, content: bytes, first: int, *, stop: int | None = None) -> Response:
        """Answer a Range from `first` on; the connection breaks at `stop`."""

        async def pieces() -> AsyncIterator[bytes]:
            yield content[first:stop]

        headers = {
            "etag": file(content).headers["etag"],
            "content-range": f"bytes {first}-{len(content) - 1}/{len(content)}",
            "content-length": str(len(content) - first),
        }
        return StreamingResponse(pieces(), status_code=206, headers=headers)

    def ranges(self, service: ScriptedService) -> list[tuple[str | None, str | None]]:
        return [
            (request.headers.get("range"), request.headers.get("if-range"))
            for request in service.requests
        ]

    def test_a_broken_connection_is_taken_up_where_it_broke(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        service.answers(broken_off(CONTENT), self.partial(CONTENT, HALF))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [CONTENT]
        etag = file(CONTENT).headers["etag"]
        assert self.ranges(service) == [(None, None), (f"bytes={HALF}-", etag)]

    def test_a_later_program_goes_on(self, service: ScriptedService, tmp_path: Path) -> None:
        service.answers(broken_off(CONTENT), problem(400))
        with Client(service.url, attempts=1) as client, pytest.raises(WinnowError):
            client.download("aud_1", tmp_path / "suspects.csv")
        assert (tmp_path / "suspects.csv.part").stat().st_size == HALF
        service.answers(self.partial(CONTENT, HALF))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.name for entry in tmp_path.iterdir()] == ["suspects.csv"]
        assert (tmp_path / "suspects.csv").read_bytes() == CONTENT

    def test_many_breaks_are_no_matter_while_something_comes(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        """More of them than there are attempts for one call."""
        step = len(CONTENT) // 10
        pieces = [self.partial(CONTENT, at, stop=at + step) for at in range(HALF, 9 * step, step)]
        service.answers(broken_off(CONTENT), *pieces, self.partial(CONTENT, 9 * step))
        with Client(service.url, attempts=2) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert (tmp_path / "suspects.csv").read_bytes() == CONTENT
        assert len(service.requests) == 6

    def test_a_connection_that_brings_nothing_ends_the_call_and_keeps_what_came(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        service.answers(broken_off(CONTENT), self.partial(CONTENT, HALF, stop=HALF))
        path = tmp_path / "suspects.csv"
        path.write_bytes(b"an older ranking")
        with Client(service.url, attempts=2) as client, pytest.raises(ServiceUnreachable):
            client.download("aud_1", path)
        assert (tmp_path / "suspects.csv.part").read_bytes() == CONTENT[:HALF]
        assert path.read_bytes() == b"an older ranking"

    def test_a_file_that_changed_meanwhile_starts_anew(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        """If-Range makes the service answer 200 with the whole of the other file."""
        other = CONTENT.replace(b"rank", b"Rank")
        service.answers(broken_off(CONTENT), file(other))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [other]

    def test_a_shorter_file_that_cannot_be_gone_on_with_starts_anew(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        service.answers(broken_off(CONTENT), problem(416), file(b"short"))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"short"]

    def test_what_was_damaged_on_disk_is_fetched_anew(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        (tmp_path / "suspects.csv.part").write_bytes(b"x" * HALF)
        (tmp_path / "suspects.csv.part.etag").write_text(file(CONTENT).headers["etag"])
        service.answers(self.partial(CONTENT, HALF), file(CONTENT))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [CONTENT]

    def test_a_part_of_which_nobody_knows_the_file_is_not_used(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        (tmp_path / "suspects.csv.part").write_bytes(b"x" * HALF)
        service.answers(file(CONTENT))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [CONTENT]
        assert self.ranges(service) == [(None, None)]

    def test_another_part_than_was_asked_for_is_not_taken(
        self, service: ScriptedService, tmp_path: Path
    ) -> None:
        service.answers(broken_off(CONTENT), self.partial(CONTENT, 10), file(CONTENT))
        with Client(service.url) as client:
            client.download("aud_1", tmp_path / "suspects.csv")
        assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [CONTENT]


class TestBehindAProxyThatCuts:
    """The real service, through connections that break in the middle."""

    def test_a_download_goes_on(
        self, url: str, api_key: str, engine: Engine, settings: Settings, tmp_path: Path
    ) -> None:
        audit = make_finished_audit(engine, settings, num_train=2_000)
        to = tmp_path / "to"
        to.mkdir()
        with (
            cutting_proxy(url, after_bytes=60_000) as proxy,
            Client(proxy.url, api_key, attempts=2) as client,
        ):
            path = client.download(audit.id, to / "suspects.jsonl")
        assert proxy.num_cut >= 5
        results = audit_folder(settings.data_dir, audit.id) / "results"
        stored = results / audit.summary["ranking_id"] / "suspects.jsonl"
        assert path.read_bytes() == stored.read_bytes()
        assert list(to.iterdir()) == [path]

    def test_an_upload_is_sent_again_and_is_one_dataset(
        self, url: str, api_key: str, client: Client
    ) -> None:
        """Cut in the middle of the file, or of the answer, which nobody gets then."""
        table = CSV_TABLE.encode() * 2_000
        with cutting_proxy(url, of_caller=30_000) as proxy:
            with Client(proxy.url, api_key, attempts=2) as cut, pytest.raises(ServiceUnreachable):
                cut.upload_dataset(table, file_format="csv")
            assert proxy.num_cut == 2
        assert list(client.datasets()) == []
        with cutting_proxy(url, after_bytes=40) as proxy:
            with Client(proxy.url, api_key, attempts=3) as cut, pytest.raises(ServiceUnreachable):
                cut.upload_dataset(table, file_format="csv", idempotency_key="k")
            assert proxy.num_cut == 3
        (dataset,) = client.datasets()
        again = client.upload_dataset(table, file_format="csv", idempotency_key="k")
        assert again.id == dataset.id


def test_a_refused_download_raises_the_problem(service: ScriptedService, tmp_path: Path) -> None:
    service.answers(problem(409, title="Conflict", detail="The audit is still running."))
    with Client(service.url) as client, pytest.raises(WinnowError, match="still running"):
        client.download("aud_1", tmp_path / "suspects.parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_format_can_be_said_apart_from_the_name(
    service: ScriptedService, tmp_path: Path
) -> None:
    service.answers(file(CONTENT))
    with Client(service.url) as client:
        client.download("aud_1", tmp_path / "suspects.tsv", file_format="csv")
        assert service.requests[0].url.path.endswith("/suspects.csv")
        with pytest.raises(ValueError, match=r"end it in \.parquet, \.csv or \.jsonl"):
            client.download("aud_1", tmp_path / "suspects.tsv")
