"""What the OpenAPI document says of scopes: every call with the one that it needs."""

from typing import Any

from app.keys.scopes import MEANING, scope_of

SECURITY = "HTTPBearer"


def describe_scopes(document: dict[str, Any]) -> None:
    """Add each operation's scope to its security requirement, and what the scopes mean."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if "security" in operation:
                scope = scope_of(method.upper(), path)
                operation["security"] = [{SECURITY: [scope.value] if scope else []}]
    meanings = "\n".join(f"- `{scope}`: {meaning}" for scope, meaning in MEANING.items())
    document["components"]["securitySchemes"][SECURITY]["description"] = (
        "An API key of `winnow keys create`, as a bearer token. It has all scopes, or those "
        f"that it was made with:\n\n{meanings}"
    )
