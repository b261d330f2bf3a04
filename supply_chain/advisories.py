"""Known weaknesses of what is pinned, where a list of them can be reached."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from supply_chain.pins import pinned

Source = Literal["pypi", "osv"]
SOURCES: tuple[Source, ...] = ("pypi", "osv")
PATIENCE_SECONDS = 300
CANARY = "jinja2==2.10"  # has had advisories since 2019: a source that tells none does not work


@dataclass(frozen=True)
class Audit:
    """What a source told.

    Attributes:
        source: which one could be reached; None for none.
        found: a line for every advisory.
        skipped: packages that the source does not know.
        trouble: why no source could be used.
    """

    source: Source | None
    found: list[str]
    skipped: list[str]
    trouble: str = ""


def audit() -> Audit:
    """Ask the first source that works about every pinned package."""
    wanted = [f"{pin.key}=={pin.version}" for pin in pinned()]
    trouble = []
    for source in SOURCES:
        try:
            if not _ask(source, [CANARY]).found:
                trouble.append(f"{source} tells of no advisory, not even for {CANARY}")
                continue
            return _ask(source, wanted)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            trouble.append(f"{source} cannot be reached: {str(error).splitlines()[-1][:200]}")
    return Audit(None, [], [], trouble="; ".join(trouble))


def _ask(source: Source, requirements: list[str]) -> Audit:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(requirements) + "\n")
        options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
        done = subprocess.run(  # noqa: S603  our own command
            [sys.executable, "-m", "pip_audit", "-s", source, "-r", str(file), *options],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    if not done.stdout.strip():
        raise ValueError(done.stderr.strip() or "pip-audit said nothing")
    told = json.loads(done.stdout)["dependencies"]
    found = [
        f"{one['name']} {one['version']}: {weakness['id']}"
        + (f", mended in {', '.join(weakness['fix_versions'])}" if weakness["fix_versions"] else "")
        for one in told
        for weakness in one.get("vulns", [])
    ]
    return Audit(source, found, [one["name"] for one in told if "skip_reason" in one])
