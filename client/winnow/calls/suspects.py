"""The calls about the ranked training samples of an audit."""

from collections.abc import AsyncGenerator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from winnow import download, tables
from winnow.calls.base import Calls, audit_path, given, ranking_parts
from winnow.results import FileFormat, SampleDetail, Suspect, SuspectPage, SuspectSummary
from winnow.tables import TableKind

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

Decided = Literal["none", "accept", "keep", "drop", "edit", "any"]


class SuspectCalls(Calls):
    """Read the ranking: page by page, as a table, as a file, or one sample with the evidence."""

    def suspects(
        self,
        audit_id: str,
        *,
        ranking_id: str | None = None,
        flagged: bool | None = None,
        label: str | None = None,
        suggested_label: str | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        min_noise_probability: float | None = None,
        max_noise_probability: float | None = None,
        search: str | None = None,
        decision: list[Decided] | Decided | None = None,
        page_size: int = 500,
    ) -> AsyncGenerator[Suspect, None]:
        """Yield the training samples of a finished audit, the most suspect first.

        Pages are fetched as they are needed.

        Args:
            audit_id: the audit.
            ranking_id: one of its rankings; its own by default.
            flagged: only those that are flagged, or only the others.
            label: only those given this label.
            suggested_label: only those with this suggested label.
            min_score: only scores from here on.
            max_score: only scores up to here.
            min_noise_probability: only those that are wrong with this probability, or more.
            max_noise_probability: only those that are wrong with this probability, or less.
            search: only texts that hold this, in upper or lower case.
            decision: only those decided so; `none` are the undecided, `any` all others.
            page_size: samples in one call, up to 1,000.
        """
        params = {
            "flagged": flagged,
            "label": label,
            "suggested_label": suggested_label,
            "min_score": min_score,
            "max_score": max_score,
            "min_noise_probability": min_noise_probability,
            "max_noise_probability": max_noise_probability,
            "search": search,
            "decision": decision,
            "limit": page_size,
        }
        path = audit_path(audit_id, *ranking_parts(ranking_id), "suspects")
        return self._pages(SuspectPage, path, params)

    async def suspects_summary(
        self,
        audit_id: str,
        *,
        ranking_id: str | None = None,
        flagged: bool | None = None,
        label: str | None = None,
        suggested_label: str | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        min_noise_probability: float | None = None,
        max_noise_probability: float | None = None,
        search: str | None = None,
        decision: list[Decided] | Decided | None = None,
    ) -> SuspectSummary:
        """Count what a filter matches: by pairs of labels, by decision, by score.

        The filters are those of `suspects`.
        """
        params = {
            "flagged": flagged,
            "label": label,
            "suggested_label": suggested_label,
            "min_score": min_score,
            "max_score": max_score,
            "min_noise_probability": min_noise_probability,
            "max_noise_probability": max_noise_probability,
            "search": search,
            "decision": decision,
        }
        path = audit_path(audit_id, *ranking_parts(ranking_id), "suspects", "summary")
        return await self._connection.ask(SuspectSummary, "GET", path, params=given(params))

    @overload
    async def suspects_table(
        self,
        audit_id: str,
        kind: Literal["pandas"] = "pandas",
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> "pd.DataFrame": ...

    @overload
    async def suspects_table(
        self,
        audit_id: str,
        kind: Literal["polars"],
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> "pl.DataFrame": ...

    @overload
    async def suspects_table(
        self,
        audit_id: str,
        kind: Literal["arrow"],
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> "pa.Table": ...

    async def suspects_table(
        self,
        audit_id: str,
        kind: TableKind = "pandas",
        *,
        flagged: bool | None = None,
        ranking_id: str | None = None,
    ) -> Any:
        """Return the whole ranking as a table, the most suspect first, with typed columns.

        Args:
            audit_id: the audit.
            kind: pandas, polars or arrow: a DataFrame of the one or the other, or a pyarrow.Table.
                Each is an extra of this package: `pip install 'winnow-client[polars]'`.
            flagged: only those that are flagged, or only the others.
            ranking_id: one of the audit's rankings; its own by default.

        Raises:
            MissingExtra: the library is not installed.
        """
        tables.require(kind)
        with TemporaryDirectory(prefix="winnow-") as folder:
            path = Path(folder) / "suspects.parquet"
            await self.download(audit_id, path, ranking_id=ranking_id)
            return tables.read(path, kind, flagged=flagged)

    async def sample(
        self, audit_id: str, index: int, *, ranking_id: str | None = None
    ) -> SampleDetail:
        """Return one training sample, by its row in the training file, with the evidence.

        Its score, rank and layers are those of the audit's own ranking, or of another one.
        """
        path = audit_path(audit_id, *ranking_parts(ranking_id), "samples", str(index))
        return await self._connection.ask(SampleDetail, "GET", path)

    async def download(
        self,
        audit_id: str,
        path: Path | str,
        *,
        file_format: FileFormat | None = None,
        ranking_id: str | None = None,
    ) -> Path:
        """Save the whole ranking as one file, checked against its SHA-256.

        A download that broke off, also one of an earlier program, goes on where it ended: what came
        stands beside the file as `NAME.part`.

        Args:
            audit_id: the audit.
            path: where to; it appears there only when it is complete.
            file_format: parquet, csv or jsonl; by default the path's ending says which.
            ranking_id: one of the audit's rankings; its own by default.

        Raises:
            DownloadDamaged: other bytes came than the service meant to send.
            ValueError: the ending says no format, and neither does `file_format`.
        """
        path = Path(path)
        ending = file_format or path.suffix.removeprefix(".")
        if ending not in get_args(FileFormat):
            raise ValueError(
                f"{path.name!r} does not say a format: end it in .parquet, .csv or .jsonl, "
                "or pass file_format"
            )
        source = audit_path(audit_id, *ranking_parts(ranking_id), f"suspects.{ending}")
        await download.save(self._connection, source, path)
        return path
