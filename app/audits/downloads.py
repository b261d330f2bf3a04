"""The whole ranking as one file: strong ETag, ranges, never half a file."""

import re
from pathlib import Path

from fastapi import Response
from starlette.responses import FileResponse

from app.audits.answers import SCORE_ORDER, FileFormat
from app.audits.assemble import ranking_path
from app.audits.models import Ranking
from app.conditional import entity_tag, is_unchanged
from app.errors import NotFound, RangeNotSatisfiable
from app.shared_files import fetch_once

MEDIA_TYPES: dict[FileFormat, str] = {
    "parquet": "application/vnd.apache.parquet",
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/jsonl",
}

# first-, first-last or -last; the last bytes of a file.
_RANGE = re.compile(r"(?:(?P<first>\d{1,18})-(?:\d{1,18})?|-(?P<last>\d{1,18}))")


def ranking_file(
    folder: Path,
    ranking: Ranking,
    file_format: FileFormat,
    *,
    if_none_match: str | None,
    requested_range: str | None,
) -> Response:
    """Return a finished ranking's file, a part of it, or 304.

    Args:
        folder: the audit's.
        ranking: its summary holds size and SHA-256 of the files.
        file_format: which file.
        if_none_match: the request's header.
        requested_range: the request's header; parts by Starlette, errors as problems.

    Raises:
        NotFound: the file is gone from the data directory.
        RangeNotSatisfiable: the part is none of the file's.
    """
    described = ranking.summary["files"][file_format]
    etag = entity_tag(described["sha256"])
    # A file never changes once it is there, but a shared cache must still ask whose it is.
    headers = {
        "ETag": etag,
        "Cache-Control": "private, no-cache",
        "Winnow-Score-Order": SCORE_ORDER,
    }
    if is_unchanged(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    path = folder / ranking.folder / f"suspects.{file_format}"
    if not fetch_once(path):
        raise NotFound(
            "The file is gone from the server's data directory. The ranking is still there, page "
            f"by page: GET {ranking_path(ranking, 'suspects')}."
        )
    if requested_range is not None:
        _check_range(requested_range, described["bytes"])
    return FileResponse(
        path,
        headers=headers,
        media_type=MEDIA_TYPES[file_format],
        filename=f"{ranking.audit_id if ranking.is_own else ranking.id}-suspects.{file_format}",
    )


def _check_range(requested: str, size: int) -> None:
    unit, _, ranges = requested.partition("=")
    parts = [_RANGE.fullmatch(part.strip()) for part in ranges.split(",")]
    is_satisfiable = unit.strip().lower() == "bytes" and all(
        part is not None
        and (int(part["first"]) < size if part["first"] is not None else int(part["last"]) > 0)
        and not _is_backward(part)
        for part in parts
    )
    if not is_satisfiable:
        raise RangeNotSatisfiable(
            f"The Range header {requested!r} names no part of this file of {size:,} bytes; use "
            "bytes=first-last, counted from 0.",
            headers={"Content-Range": f"bytes */{size}"},
        )


def _is_backward(part: re.Match[str]) -> bool:
    first, _, last = part[0].partition("-")
    return bool(first and last) and int(last) < int(first)
