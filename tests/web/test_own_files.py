"""Our own files as a browser gets them: whether all come, of which type, and for how long."""

import re
from pathlib import PurePosixPath
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from app.web.own_files import STATIC, static_version

IMPORT = re.compile(r'^(?:import|export)\b[^;]*?"([^"]+)";', re.MULTILINE)
NAMES = re.compile(r'^import \{([^}]+)\} from "([^"]+)";', re.MULTILINE)
EXPORT = re.compile(r"^export (?:async function|function|class|const) ([$\w]+)", re.MULTILINE)


def linked_files(client: TestClient) -> dict[str, str]:
    """Return the addresses that every page loads, by the names of their files."""
    found = re.findall(r'(?:src|href)="(/static/[^"]+)"', client.get("/sign-in").text)
    return {PurePosixPath(address).name: address for address in found}


def test_every_module_that_is_imported_is_served(client: TestClient) -> None:
    """From the script that the page names, along the addresses that a browser would follow."""
    waiting, reached = [linked_files(client)["main.js"]], set[str]()
    while waiting:
        address = waiting.pop()
        response = client.get(address)
        assert response.status_code == 200, address
        assert response.headers["content-type"].partition(";")[0] == "text/javascript"
        reached.add(address)
        imports = IMPORT.findall(response.text)
        assert all(name.startswith(("./", "../")) for name in imports), address
        waiting += {urljoin(address, name) for name in imports} - reached
    written = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.js")}
    assert reached == {f"/static/{static_version()}/{name}" for name in written}


def test_every_name_that_is_imported_is_exported() -> None:
    for path in STATIC.rglob("*.js"):
        for names, source in NAMES.findall(path.read_text(encoding="utf-8")):
            exporter = (path.parent / source).read_text(encoding="utf-8")
            exported = set(EXPORT.findall(exporter))
            assert {name.strip() for name in names.split(",")} <= exported, f"{path}: {source}"


@pytest.mark.parametrize("name", ["main.js", "winnow.css", "icon.svg"])
def test_a_file_of_this_version_is_kept_and_of_another_is_not(
    client: TestClient, name: str
) -> None:
    address = linked_files(client)[name]
    current = client.get(address)
    assert current.headers["cache-control"] == "public, max-age=31536000, immutable"
    earlier = client.get(address.replace(static_version(), "0123456789abcdef"))
    assert earlier.text == current.text
    assert earlier.headers["cache-control"] == "no-cache"
    for response in (current, earlier):
        assert response.headers["x-content-type-options"] == "nosniff"
    assert (
        client.get(address, headers={"If-None-Match": current.headers["etag"]}).status_code == 304
    )


@pytest.mark.parametrize(
    "path", ["", "winnow.css", "v", "v/js", "v/none.js", "v/%2e%2e/%2e%2e/own_files.py"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/static/{path}").status_code == 404
