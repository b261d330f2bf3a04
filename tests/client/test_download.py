"""A download is the file that the service meant to send, or no file at all."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.responses import Response, StreamingResponse
from winnow import Client, DownloadDamaged, ServiceUnreachable, WinnowError

from tests.client.answers import file, problem
from tests.client.conftest import ScriptedService

CONTENT = b'{"rank": 0}\n' * 10_000


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


def test_a_broken_connection_starts_the_download_anew(
    service: ScriptedService, tmp_path: Path
) -> None:
    service.answers(broken_off(CONTENT), file(CONTENT))
    with Client(service.url) as client:
        client.download("aud_1", tmp_path / "suspects.csv")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [CONTENT]


def test_a_connection_that_always_breaks_leaves_nothing(
    service: ScriptedService, tmp_path: Path
) -> None:
    service.answers(*(broken_off(CONTENT) for _ in range(3)))
    with Client(service.url, attempts=2) as client, pytest.raises(ServiceUnreachable):
        client.download("aud_1", tmp_path / "suspects.csv")
    assert list(tmp_path.iterdir()) == []


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
