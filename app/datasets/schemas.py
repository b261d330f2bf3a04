"""What datasets look like over HTTP."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.datasets.columns import columns_by_header, kind_of_fields
from app.datasets.files import ColumnNames, DatasetSummary, FileFormat

ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class UploadOptions(BaseModel):
    """The form fields beside the file."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        None, description="What to call it. Default: the file's name."
    )
    format: FileFormat | None = Field(
        None, description="Default: told from the file's first bytes and its name."
    )
    text_column: ColumnName | None = Field(
        None,
        description="The column of texts. Without any column option the kind is told by the "
        "header: text and label, else prompt and completion, else messages.",
    )
    text_pair_column: ColumnName | None = Field(
        None, description="The second text, for tasks on pairs."
    )
    label_column: ColumnName | None = Field(
        None, description="Class labels: integers or strings. Default: label."
    )
    prompt_column: ColumnName | None = Field(
        None, description="For a causal language model: what is given to it."
    )
    completion_column: ColumnName | None = Field(
        None, description="For a causal language model: what it should write."
    )
    messages_column: ColumnName | None = Field(
        None,
        description="Instead of both: a chat, a list of {role, content} that ends with the "
        "assistant's answer; in CSV as JSON.",
    )
    noise_column: ColumnName | None = Field(
        None,
        description="True or 1 where a label or completion is known to be wrong; only used to "
        "measure.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kind_of_fields(self._named(), suffix="_column")
        return self

    def columns(self, header: Sequence[str]) -> ColumnNames:
        """Return the columns by what they hold.

        Args:
            header: all columns of the file; they tell the kind where the options do not.
        """
        named = self._named()
        if kind_of_fields(named) is None:
            return columns_by_header(header, noise=self.noise_column)
        return ColumnNames(**named)

    def _named(self) -> dict[str, str | None]:
        fields = ColumnNames.model_fields
        return {field: getattr(self, f"{field}_column") for field in fields}


class Dataset(BaseModel):
    """An uploaded dataset, checked row by row."""

    id: str = Field(examples=["ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"])
    reference: str = Field(
        description="Pass as train.reference or validation.reference of an audit.",
        examples=["upload:ds_0192f0c1a1b27c3d8e4f5a6b7c8d9e0f"],
    )
    name: str
    format: FileFormat
    columns: ColumnNames = Field(description="The columns it was checked with.")
    num_rows: int
    num_bytes: int
    sha256: str = Field(description="Of the file as it was sent.")
    summary: DatasetSummary
    created_at: datetime
    links: dict[str, str]
