"""What the routes of audits and of rankings have in common: parameters, and what OpenAPI says."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query

from app.audits import answers, repository
from app.audits.answers import SCORE_ORDER
from app.audits.assemble import assemble_suspect
from app.audits.downloads import MEDIA_TYPES
from app.audits.filters import (
    MAX_INDEX,
    MAX_SCORE,
    MAX_SEARCH_CHARS,
    DecisionState,
    SuspectFilter,
)
from app.audits.service import Results
from app.pagination import Cursor, Limit, cut_page, decode_cursor, encode_cursor

AuditId = Annotated[str, Path(max_length=100, description="As POST /v1/audits answered it.")]
RankingId = Annotated[
    str, Path(max_length=100, description="As POST /v1/audits/{audit_id}/rankings answered it.")
]
OfRanking = Annotated[
    str | None,
    Query(max_length=100, description="Which ranking. Default: the audit's own."),
]
SampleIndex = Annotated[int, Path(ge=0, le=MAX_INDEX, description="Row of the training file.")]
Score = Annotated[float | None, Query(ge=-MAX_SCORE, le=MAX_SCORE, allow_inf_nan=False)]
Probability = Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="For a day, the same key with the same body gives the same answer.",
    ),
]
RequestedRange = Annotated[
    str | None, Header(alias="Range", max_length=2000, description="bytes=first-last")
]

RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which it makes sense to look; while it runs.",
        "schema": {"type": "integer"},
    }
}
ETAG = {"ETag": {"description": "For If-None-Match.", "schema": {"type": "string"}}}
LOCATION = {"Location": {"description": "What was made.", "schema": {"type": "string"}}}
REPLAYED = {
    "Idempotent-Replayed": {
        "description": "true: an earlier call with this key made it.",
        "schema": {"type": "string"},
    }
}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "Unchanged since the ETag."}}
DOWNLOAD: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole ranking, the most suspect first.",
        "headers": {
            **ETAG,
            "Winnow-Score-Order": {"description": SCORE_ORDER, "schema": {"type": "string"}},
        },
        "content": {kind: {} for kind in MEDIA_TYPES.values()},
    },
    206: {"description": "The part that the Range header asked for."},
    **NOT_MODIFIED,
}


@dataclass
class _FilterQuery:
    """Which samples of a ranking count."""

    flagged: Annotated[bool | None, Query(description="Only flagged, or only others.")] = None
    label: Annotated[
        str | None, Query(max_length=200, description="Only samples with this given label.")
    ] = None
    suggested_label: Annotated[
        str | None, Query(max_length=200, description="Only samples with this suggested label.")
    ] = None
    min_score: Score = None
    max_score: Score = None
    min_noise_probability: Probability = None
    max_noise_probability: Probability = None
    search: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=MAX_SEARCH_CHARS,
            description="Only samples whose text or second text holds this, whatever the case. "
            "Every text is looked at: some seconds a million where little is found.",
        ),
    ] = None
    decision: Annotated[
        list[DecisionState] | None,
        Query(
            max_length=6,
            description="Only samples with one of these decisions; none: undecided, any: decided.",
        ),
    ] = None

    def filters(self) -> SuspectFilter:
        """Return what the query says."""
        names = SuspectFilter.model_fields
        return SuspectFilter.model_validate({name: getattr(self, name) for name in names})


FilterQuery = Annotated[_FilterQuery, Depends()]


@dataclass
class _SuspectQuery:
    """A page of a ranking, and which of its samples count."""

    query: FilterQuery
    limit: Limit = 100
    cursor: Cursor = None

    def page(self, results: Results) -> answers.SuspectPage:
        """Return the page.

        Raises:
            InvalidRequest: the cursor is not one of this list.
        """
        rows = repository.list_suspects(
            results.session,
            results.ranking,
            self.query.filters(),
            limit=self.limit,
            after_rank=decode_cursor(self.cursor, int) if self.cursor else None,
        )
        data, has_more = cut_page([assemble_suspect(row) for row in rows], self.limit)
        return answers.SuspectPage(
            data=data,
            next_cursor=encode_cursor(data[-1].rank) if has_more else None,
            has_more=has_more,
            ranking_id=results.ranking.id,
        )


SuspectQuery = Annotated[_SuspectQuery, Depends()]
