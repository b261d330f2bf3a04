"""The API reference as Markdown: python -m app.api_reference > docs/api.md.

It is made from the OpenAPI document; what the page should say of a field is said in its schema.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from app.main import create_app
from app.settings import Settings

INTRODUCTION = """\
# API reference

*Made by `python -m app.api_reference > docs/api.md`; change the schemas, not this page.*

A running service shows the same at `/docs`, where calls can be tried, and as JSON at
`/openapi.json`. A key needs the [scope](deployment.md#access) of a call. All there is to say of an
audit's options stands in [request.md](request.md), of errors in [errors.md](errors.md).
"""

PROBLEM = "application/problem+json"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SCHEMA_PREFIX = "#/components/schemas/"

JsonObject = dict[str, Any]


def openapi_document() -> JsonObject:
    """Return the OpenAPI document; no server is needed, and none is connected to."""
    settings = Settings(
        database_url="postgresql://nobody@localhost/none", broker_url="redis://localhost:6379/0"
    )
    return create_app(settings).openapi()


def reference(document: JsonObject) -> str:
    """Return the whole page."""
    return "\n".join(_tidy(_page(document)))


def _page(document: JsonObject) -> Iterator[str]:
    yield INTRODUCTION
    operations = [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    tags = document.get("tags", [])
    known = {tag["name"] for tag in tags}
    others = {tag for *_, operation in operations for tag in operation["tags"]} - known
    tags = [*tags, *({"name": name, "description": ""} for name in sorted(others))]
    yield "\n| calls | |"
    yield "|---|---|"
    for tag in tags:
        yield f"| {_link(tag['name'].capitalize())} | {_cell(tag['description'])} |"
    yield f"| {_link('Schemas')} | The objects of requests and answers. |"
    for tag in tags:
        yield f"\n## {tag['name'].capitalize()}\n\n{tag['description']}"
        for method, path, operation in operations:
            if operation["tags"][0] == tag["name"]:
                yield from _operation(method, path, operation)
    yield "\n## Schemas\n\nThe third column is empty where a field is always there."
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _schema(name, schema)


def _operation(method: str, path: str, operation: JsonObject) -> Iterator[str]:
    yield f"\n### {method} {path}\n\n**{operation['summary']}.**"
    yield _text(operation.get("description"))
    for scope in operation.get("security", [{}])[0].get("HTTPBearer", []):
        yield f"\nScope: `{scope}`"
    if parameters := operation.get("parameters"):
        yield "\n| parameter | in | type | default | |"
        yield "|---|---|---|---|---|"
        for parameter in parameters:
            schema = parameter["schema"]
            default = "required" if parameter["required"] else _default(schema)
            said = parameter.get("description", "")
            name, place = parameter["name"], parameter["in"]
            yield f"| `{name}` | {place} | {_type(schema)} | {default} | {_cell(said)} |"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        if "$ref" in content["schema"]:
            yield f"\nBody (`{kind}`): {_type(content['schema'])}"
        else:
            yield f"\nBody (`{kind}`):"
            yield from _fields(content["schema"])
    yield from _answers(operation["responses"])


def _answers(responses: JsonObject) -> Iterator[str]:
    answers = {
        status: answer for status, answer in responses.items() if PROBLEM not in _content(answer)
    }
    yield "\n| answer | | headers |"
    yield "|---|---|---|"
    for status, answer in sorted(answers.items()):
        said = _cell(answer.get("description", "")).replace("Successful Response", "")
        parts = [_kind(kind, of) for kind, of in _content(answer).items()]
        what = " · ".join(part for part in (said, ", ".join(parts)) if part)
        headers = ", ".join(f"`{name}`" for name in answer.get("headers", {}))
        yield f"| {status} | {what} | {headers} |"
    errors = sorted(set(responses) - set(answers))
    if errors:
        named = (f"{status} {responses[status]['description']}" for status in errors)
        yield f"\nErrors ({_link('Problem')}): {_cell('; '.join(named))}."


def _content(answer: JsonObject) -> JsonObject:
    content: JsonObject = answer.get("content", {})
    return content


def _kind(kind: str, content: JsonObject) -> str:
    schema = content.get("schema") or {}
    typed = _type(schema) if schema and schema.get("type") != "string" else ""
    return typed if kind == "application/json" and typed else f"`{kind}`"


def _schema(name: str, schema: JsonObject) -> Iterator[str]:
    yield f"\n### {name}\n\n{_text(schema.get('description'))}"
    if "properties" in schema:
        yield from _fields(schema)
    else:
        yield f"\n{_type(schema)}"


def _fields(schema: JsonObject) -> Iterator[str]:
    required = set(schema.get("required", ()))
    yield "\n| field | type | default | |"
    yield "|---|---|---|---|"
    for name, field in schema.get("properties", {}).items():
        default = "" if name in required else _default(field)
        yield f"| `{name}` | {_type(field)} | {default} | {_cell(field.get('description', ''))} |"


def _default(schema: JsonObject) -> str:
    return f"`{_json(schema['default'])}`" if "default" in schema else "optional"


def _type(schema: JsonObject) -> str:
    """Return a type and its limits in words."""
    if "$ref" in schema:
        return _link(schema["$ref"].removeprefix(SCHEMA_PREFIX))
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type(part) for part in schema[several])
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_json(value)}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        limits = _limits(schema)
        said = f"list of {_type(schema.get('items', {}))}"
        return f"{said} ({limits})" if limits else said
    if kind == "object":
        values = schema.get("additionalProperties")
        said = f"object of {_type(values)}" if isinstance(values, dict) else "object"
    elif kind == "string":
        said = {"date-time": "time", "binary": "file"}.get(schema.get("format", ""), "string")
    else:
        said = str(kind or "anything")
    limits = _limits(schema)
    return f"{said}, {limits}" if limits else said


def _limits(schema: JsonObject) -> str:
    if "minimum" in schema and "maximum" in schema:
        said = [f"{schema['minimum']:,.15g} to {schema['maximum']:,.15g}"]
    else:
        said = [f"{sign} {schema[name]:,.15g}" for name, sign in BOUNDS.items() if name in schema]
    for unit, kind in (("Length", "characters"), ("Items", "items"), ("Properties", "entries")):
        low, high = schema.get(f"min{unit}"), schema.get(f"max{unit}")
        if high is not None:
            said.append(f"{low} to {high:,} {kind}" if low else f"at most {high:,} {kind}")
        elif low:
            said.append(f"at least {low} {kind}")
    if "pattern" in schema:
        said.append(f"matching `{_cell(schema['pattern'])}`")
    return ", ".join(said)


def _json(value: object) -> str:
    return _cell(json.dumps(value, ensure_ascii=False))


def _link(name: str) -> str:
    return f"[{name}](#{slug(name)})"


def slug(heading: str) -> str:
    """Return the anchor that a heading gets: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _text(text: str | None) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (text or "").strip())


def _cell(text: str) -> str:
    """Return text for a cell of a table, where a bar or a line break would end it."""
    return " ".join(re.sub(r"(?<!\\)\|", r"\\|", text).split())


def _tidy(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines without trailing blanks, and never two empty ones in a row."""
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines))
    yield text.rstrip()


if __name__ == "__main__":
    sys.stdout.write(reference(openapi_document()) + "\n")
