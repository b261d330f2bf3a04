"""The calls about decisions, and about the data set that they make."""

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Literal

from winnow import download
from winnow.calls.base import Calls, audit_path, given
from winnow.requests import DecisionRequest, UndoRequest
from winnow.results import DecisionBatch, DecisionPreview, Page, Precision

Applied = Literal["decisions", "drop", "correct"]


class DecisionCalls(Calls):
    """Decide about suspects, take decisions back, and export the data set without the errors."""

    async def decide(
        self, audit_id: str, request: DecisionRequest | Mapping[str, Any]
    ) -> DecisionBatch:
        """Decide about samples in one batch, which `undo` takes back.

        It is not sent again when the answer is lost: with `as_of` a second call tells whether the
        first has acted.

        Args:
            audit_id: the audit.
            request: the action and the samples, typed or as the JSON body.
        """
        path = audit_path(audit_id, "decisions")
        return await self._post_once(DecisionBatch, path, _body(request))

    async def preview(
        self, audit_id: str, request: DecisionRequest | Mapping[str, Any]
    ) -> DecisionPreview:
        """Count the samples that `decide` would act on with the same request."""
        path = audit_path(audit_id, "decisions", "preview")
        return await self._connection.ask(DecisionPreview, "POST", path, json=_body(request))

    def decisions(
        self, audit_id: str, *, page_size: int = 100
    ) -> AsyncGenerator[DecisionBatch, None]:
        """Yield the batches of decisions, the newest first."""
        return self._pages(
            Page[DecisionBatch], audit_path(audit_id, "decisions"), {"limit": page_size}
        )

    async def undo(
        self, audit_id: str, batch_id: str, *, reviewer: str | None = None
    ) -> DecisionBatch:
        """Take a batch back: its samples have what they had before, or what was decided since.

        Args:
            audit_id: the audit.
            batch_id: the batch, as `decide` or `decisions` returned it.
            reviewer: who takes it back, where calls have no key.
        """
        path = audit_path(audit_id, "decisions", batch_id, "undo")
        return await self._post_once(DecisionBatch, path, UndoRequest(reviewer=reviewer).body())

    async def precision(self, audit_id: str, *, ranking_id: str | None = None) -> Precision:
        """Return how many of the decided samples among the most suspect were wrong."""
        path = audit_path(audit_id, "decisions", "precision")
        params = given({"ranking_id": ranking_id})
        return await self._connection.ask(Precision, "GET", path, params=params)

    async def export(
        self,
        audit_id: str,
        path: Path | str,
        *,
        suspects: Applied = "decisions",
        ranking_id: str | None = None,
    ) -> Path:
        """Save the training set without its errors, in its original format and column order.

        Args:
            audit_id: the audit.
            path: where to; it appears there only when it is complete. In a folder it gets the name
                of the training set.
            suspects: `decisions` does what reviewers decided; `drop` leaves all flagged samples
                out, `correct` gives them their suggested label.
            ranking_id: whose flags count; those of the audit's own by default.
        """
        return await self._save(audit_id, "export", path, suspects, ranking_id)

    async def patch(
        self,
        audit_id: str,
        path: Path | str,
        *,
        suspects: Applied = "decisions",
        ranking_id: str | None = None,
    ) -> Path:
        """Save what `export` with the same options changes as JSONL, a line for every changed row.

        A line has the row's index, the change, its column, and the value before and after.
        """
        return await self._save(audit_id, "export/patch", path, suspects, ranking_id)

    async def _save(
        self, audit_id: str, what: str, path: Path | str, suspects: Applied, ranking_id: str | None
    ) -> Path:
        return await download.save_stream(
            self._connection,
            audit_path(audit_id, *what.split("/")),
            Path(path),
            params=given({"suspects": suspects, "ranking_id": ranking_id}),
        )


def _body(request: DecisionRequest | Mapping[str, Any]) -> dict[str, Any]:
    return request.body() if isinstance(request, DecisionRequest) else dict(request)
