"""What the OpenAPI document says of scopes: every call with the one that it needs."""

from typing import Any

from fastapi import FastAPI

from app.keys.scopes import MEANING, scope_of

SECURITY = "HTTPBearer"


def describe_scopes(app: FastAPI) -> None:
    """Add each operation's scope to its security requirement, and what the scopes mean."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if "security" in operation:
                    scope = scope_of(method.upper(), path)
                    operation["security"] = [{SECURITY: [scope.value] if scope else []}]
        meanings = "\n".join(f"- `{scope}`: {meaning}" for scope, meaning in MEANING.items())
        scheme = document["components"]["securitySchemes"][SECURITY]
        scheme["description"] = (
            "An API key of `winnow keys create`, as a bearer token. It has all scopes, or those "
            f"that it was made with:\n\n{meanings}"
        )
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
