"""Base of the answers."""

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

Item = TypeVar("Item")
FileFormat = Literal["parquet", "csv", "jsonl"]


class Result(BaseModel):
    """Base of the answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Page(Result, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    next_cursor: str | None
    has_more: bool
