"""OpenAPI links: from an answer to the calls that its ids are for."""

from collections.abc import Iterator
from typing import Any

_OK = ("200", "201", "202")
_METHODS = {"get", "post"}
# Where the id stands in what a list answers, and in what a call answers that makes one thing.
_ID_OF = {"get": "$response.body#/data/0/id", "post": "$response.body#/id"}


def describe_links(document: dict[str, Any]) -> None:
    """Let the OpenAPI document say which calls take the ids of an answer (OpenAPI 3.1, 4.8.20).

    What stands at /things/{id}, and one word further, is linked from GET and POST /things.
    """
    for path, operations in document["paths"].items():
        for method in _METHODS & operations.keys():
            links = dict(_links(document["paths"], path, identifier=_ID_OF[method]))
            for status in _OK:
                if links and status in operations[method]["responses"]:
                    operations[method]["responses"][status]["links"] = links


def _links(
    paths: dict[str, Any], path: str, *, identifier: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    of_path = {name: f"$request.path.{name}" for name in _parameters(path)}
    for other, operations in paths.items():
        name, *further = other.removeprefix(f"{path}/").split("/")
        is_below = other.startswith(f"{path}/{{") and not _parameters("/".join(further))
        if not is_below or len(further) > 1:
            continue
        parameters = {**of_path, name.strip("{}"): identifier}
        for operation in operations.values():
            identity = operation["operationId"]
            yield identity, {"operationId": identity, "parameters": parameters}


def _parameters(path: str) -> list[str]:
    return [part.strip("{}") for part in path.split("/") if part.startswith("{")]
