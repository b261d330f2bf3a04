"""What datasets look like over HTTP."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

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
    text_column: ColumnName = Field("text", description="The column of texts.")
    text_pair_column: ColumnName | None = Field(
        None, description="The second text, for tasks on pairs."
    )
    label_column: ColumnName = Field("label", description="Class labels: integers or strings.")
    noise_column: ColumnName | None = Field(
        None, description="True or 1 where a label is known to be wrong; only used to measure."
    )

    def columns(self) -> ColumnNames:
        """Return the columns by what they hold."""
        return ColumnNames(
            text=self.text_column,
            text_pair=self.text_pair_column,
            label=self.label_column,
            noise=self.noise_column,
        )


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
