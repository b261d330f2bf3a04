"""The addresses of pages: which samples a page shows, and from where on."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import QueryParams

from app.audits.filters import MAX_INDEX, SuspectFilter

Rank = Annotated[int | None, Field(ge=0, le=MAX_INDEX)]
Part = TypeVar("Part", bound=BaseModel)


class Place(BaseModel):
    """Where in the ranking a page begins, or before which rank it ends."""

    from_rank: Rank = None
    before_rank: Rank = None


def read_filter(query: QueryParams) -> tuple[SuspectFilter, Place, dict[str, str]]:
    """Return the filter and the place of an address, and what of it cannot be used, by name."""
    filters, wrong = _read(SuspectFilter, query)
    place, misplaced = _read(Place, query)
    return filters, place, wrong | misplaced


def _read(kind: type[Part], query: QueryParams) -> tuple[Part, dict[str, str]]:
    # a form without scripts sends every field: an empty one says nothing
    said: dict[str, Any] = {
        name: value for name, value in query.items() if name in kind.model_fields and value.strip()
    }
    if "decision" in said:
        said["decision"] = [value for value in query.getlist("decision") if value.strip()]
    try:
        return kind.model_validate(said), {}
    except ValidationError as error:
        wrong = {str(item["loc"][0]): item["msg"] for item in error.errors()}
        usable = {name: value for name, value in said.items() if name not in wrong}
        return kind.model_validate(usable), wrong


def query_string(*parts: Mapping[str, Any]) -> str:
    """Return `?name=value…`; a later part replaces an earlier one, None leaves it out."""
    values: dict[str, Any] = {}
    for part in parts:
        values |= part
    pairs = [
        (name, str(item).lower() if isinstance(item, bool) else str(item))
        for name, value in values.items()
        if value is not None
        for item in (value if isinstance(value, list) else [value])
    ]
    return f"?{QueryParams(pairs)}" if pairs else ""
