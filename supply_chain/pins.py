"""Every pinned package, and what is installed of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = ("constraints.txt", "requirements-checks.txt", "requirements-models.txt")


@dataclass(frozen=True)
class Pin:
    """One package that an installation of everything has.

    Attributes:
        name: as the files write it.
        version: the pinned one.
        distribution: what is installed here; None where the package is not.
    """

    name: str
    version: str
    distribution: metadata.Distribution | None

    @property
    def key(self) -> str:
        """The name as indexes compare it."""
        return canonicalize_name(self.name)

    @property
    def purl(self) -> str:
        """The package's URL."""
        return f"pkg:pypi/{self.key}@{self.version}"


def pinned() -> Iterator[Pin]:
    """Yield every pin of every file."""
    for file in FILES:
        for line in (ROOT / file).read_text().splitlines():
            wanted = line.partition("#")[0].strip()
            if not wanted:
                continue
            requirement = Requirement(wanted)
            (specifier,) = requirement.specifier
            try:
                found = metadata.distribution(requirement.name)
            except metadata.PackageNotFoundError:
                found = None
            yield Pin(requirement.name, specifier.version, found)
