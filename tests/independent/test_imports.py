"""The independent implementations serve the tests alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEERS = {"kronfluence", "dattri_llm", "dattri", "einconv", "einops", "opt_einsum", "bergson"}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ["app", "workers", "client", "migrations"])
def test_the_product_never_imports_them(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): _imported(path) & PEERS for path in files}
    assert not {path: names for path, names in found.items() if names}


def test_imports_are_seen(tmp_path: Path) -> None:
    """At the top and inside a function, of a package and from one of its modules."""
    path = tmp_path / "module.py"
    path.write_text("import kronfluence.task as task\ndef f():\n    from einops import rearrange\n")
    assert _imported(path) & PEERS == {"kronfluence", "einops"}


def test_they_are_pinned_outside_the_product() -> None:
    lines = (ROOT / "requirements-checks.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert pinned == {"kronfluence", "dattri-llm", "einconv", "einops", "opt-einsum"}
    for name in ("pyproject.toml", "constraints.txt"):
        text = (ROOT / name).read_text(encoding="utf-8").lower()
        assert not {package for package in pinned if f"{package}=" in text or f"{package}>" in text}
