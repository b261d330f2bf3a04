"""docs/api.md is what the OpenAPI document says."""

from app.api_reference import openapi_document, reference
from tests.docs.pages import GENERATED, text_of


def test_the_api_reference_is_up_to_date() -> None:
    """When it is not: python -m app.api_reference > docs/api.md."""
    assert text_of(GENERATED) == reference(openapi_document()) + "\n"


def test_every_route_and_schema_is_in_it() -> None:
    document = openapi_document()
    text = text_of(GENERATED)
    for path, item in document["paths"].items():
        for method in item:
            assert f"\n### {method.upper()} {path}\n" in text
    for name in document["components"]["schemas"]:
        assert f"\n### {name}\n" in text
