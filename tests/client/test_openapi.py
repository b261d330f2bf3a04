"""The client's models against the OpenAPI document: field by field, in both directions."""

from collections.abc import Iterator
from typing import Any

import pytest
import winnow.errors
import winnow.requests
import winnow.results
from pydantic import BaseModel

from app.main import create_app
from app.settings import Settings

Schema = dict[str, Any]

# What both sides call by different names.
NAMES = {"Columns": "ColumnNames", "ErrorItem": "ProblemItem"}
# What the client hands on as the service says it, without a model of its own.
LOOSE = {
    "DatasetSummary": "Dataset.summary",
    "FileColumn": "Dataset.summary",
    "ColumnNames": "Dataset.columns",
    "Problem": "WinnowError",
}
# Who polls does not know the version.
LOOSE_FIELDS = {*LOOSE.values(), "Progress.version", "Done.version"}
OWN = {"Page"}  # generic


def models(module: Any, base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for value in vars(module).values():
        is_model = isinstance(value, type) and issubclass(value, base) and value is not base
        if is_model and value.__name__ not in OWN:
            yield value


ANSWERS: list[type[BaseModel]] = [
    *models(winnow.results, winnow.results.Result),
    winnow.errors.ErrorItem,
]
REQUESTS: list[type[BaseModel]] = [*models(winnow.requests, winnow.requests.Request)]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Schema]:
    nowhere = {"database_url": "postgresql://localhost/none", "broker_url": "redis://localhost"}
    document = create_app(Settings.model_validate(nowhere)).openapi()
    found: dict[str, Schema] = document["components"]["schemas"]
    return found


def name_of(model: type[BaseModel]) -> str:
    return NAMES.get(model.__name__, model.__name__)


def kinds(schema: Schema, schemas: dict[str, Schema]) -> frozenset[str]:
    """Return what a value may be: string, integer, array<object:Suspect>, null, …"""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        of = schemas[name]
        return frozenset({f"object:{name}"}) if "properties" in of else kinds(of, schemas)
    if "anyOf" in schema:
        return frozenset().union(*(kinds(choice, schemas) for choice in schema["anyOf"]))
    kind = schema.get("type", "any")
    if kind == "array":
        items = "|".join(sorted(kinds(schema["items"], schemas)))
        return frozenset({f"array<{items}>"})
    if kind == "object":
        values = schema.get("additionalProperties")
        if isinstance(values, dict) and values:
            return frozenset({f"map<{'|'.join(sorted(kinds(values, schemas)))}>"})
    return frozenset({f"{kind}/{schema['format']}" if "format" in schema else kind})


def fields(
    schema: Schema, schemas: dict[str, Schema], *, leave_out: frozenset[str] = frozenset()
) -> dict[str, frozenset[str]]:
    renamed = {f"object:{own}": f"object:{name}" for own, name in NAMES.items()}
    return {
        name: frozenset(renamed.get(kind, kind) for kind in kinds(of, schemas)) - leave_out
        for name, of in schema["properties"].items()
    }


@pytest.mark.parametrize("model", ANSWERS, ids=lambda model: model.__name__)
def test_an_answer_has_the_fields_and_types_of_the_service(
    model: type[BaseModel], schemas: dict[str, Schema]
) -> None:
    own = model.model_json_schema(mode="serialization")
    said = fields(own, own.get("$defs", {}))
    of_service = fields(schemas[name_of(model)], schemas)
    loose = {
        place.partition(".")[2]
        for place in LOOSE_FIELDS
        if place.partition(".")[0] == model.__name__
    }
    assert said.keys() == of_service.keys()
    assert {name: said[name] for name in said.keys() - loose} == {
        name: of_service[name] for name in said.keys() - loose
    }


@pytest.mark.parametrize("model", REQUESTS, ids=lambda model: model.__name__)
def test_a_request_has_the_fields_and_types_of_the_service(
    model: type[BaseModel], schemas: dict[str, Schema]
) -> None:
    """Of the client's every field may be left out, but for those that the service requires."""
    own, of_service = model.model_json_schema(), schemas[name_of(model)]
    null = frozenset({"null"})
    assert fields(own, own.get("$defs", {}), leave_out=null) == fields(
        of_service, schemas, leave_out=null
    )
    assert own.get("required", []) == of_service.get("required", [])


def test_every_model_of_the_service_is_one_of_the_client(schemas: dict[str, Schema]) -> None:
    known = {name_of(model) for model in (*ANSWERS, *REQUESTS)} | LOOSE.keys()
    of_service = {name for name, schema in schemas.items() if "properties" in schema}
    pages = {name for name in of_service if name.startswith("Page_")}
    assert of_service - pages == known
    for page in pages:
        assert schemas[page]["properties"].keys() == winnow.results.Page.model_fields.keys()


def test_the_clients_page_is_the_services(schemas: dict[str, Schema]) -> None:
    own = winnow.results.Page[winnow.results.Audit].model_json_schema(mode="serialization")
    assert fields(own, own["$defs"]) == fields(schemas["Page_Audit_"], schemas)
