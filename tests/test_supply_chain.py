"""What Winnow is built from: allowed licences, a whole bill of materials, advisories where told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from supply_chain.licences import EXCEPTIONS, is_allowed, licence_of, refused
from supply_chain.materials import bill_of_materials
from supply_chain.pins import FILES, ROOT, pinned


def test_every_licence_is_allowed_or_explained() -> None:
    assert refused() == []


def test_no_exception_is_left_over() -> None:
    """Each is about a package that is pinned, and that would be refused without it."""
    by_name = {pin.key: pin for pin in pinned()}
    assert set(EXCEPTIONS) <= set(by_name)
    for name in EXCEPTIONS:
        distribution = by_name[name].distribution
        assert distribution is None or not is_allowed(licence_of(distribution)), name


@pytest.mark.parametrize(
    ("licence", "is_right"),
    [
        ("MIT", True),
        ("(MIT) AND BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("AGPL-3.0-or-later", False),
        ("Other/Proprietary License", False),
        ("", False),
    ],
)
def test_what_is_allowed(licence: str, is_right: bool) -> None:
    assert is_allowed(licence) is is_right


def test_the_bill_of_materials_names_every_pinned_package() -> None:
    document = bill_of_materials()
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    named = {component["purl"] for component in document["components"]}
    lines = [
        line.partition("#")[0].strip()
        for file in FILES
        for line in (ROOT / file).read_text().splitlines()
    ]
    pins = [line.split("==") for line in lines if line]
    assert named == {f"pkg:pypi/{canonicalize_name(name)}@{version}" for name, version in pins}
    refs = {component["bom-ref"] for component in document["components"]}
    for dependency in document["dependencies"]:
        assert set(dependency.get("dependsOn", [])) <= refs
    with_licence = [one for one in document["components"] if one.get("licenses")]
    assert len(with_licence) > 0.9 * len(named)


def test_the_command_writes_it_and_says_what_it_could_not_do(
    tmp_path: Path,
) -> None:
    """It never passes in silence where no source of advisories can be reached."""
    file = tmp_path / "sbom.json"
    done = subprocess.run(
        [sys.executable, "-m", "supply_chain", "--sbom", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert json.loads(file.read_text())["components"]
    assert "advisories: asked" in done.stdout or "advisories: NOT CHECKED" in done.stdout
    assert done.returncode == int("FOUND" in done.stdout or "NOT ALLOWED" in done.stdout)
    print(done.stdout)  # noqa: T201  a CI log shows what was checked
