"""Lay checked files out in a folder of our own: links to the large ones, which are then watched."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import DISK_FULL
from app.opening import open_resolved
from workers.sources.configs import read_json
from workers.sources.errors import SourceError, SourceField

LINKS = "links.json"


def check_unchanged(path: Path, *, field: SourceField) -> None:
    """Raise if a file that a clean folder links to is not the one that was checked.

    Weights are linked, not copied, so their owner can still move or overwrite them.

    Raises:
        SourceError: changed_file.
    """
    if not (path / LINKS).exists():  # a folder that this service wrote itself links to nothing
        return
    expected = read_json(path / LINKS, field=field)
    for name, fingerprint in expected.items():
        try:
            changed = _fingerprint(path / name) != fingerprint
        except OSError:
            changed = True
        if changed:
            raise SourceError(
                f"{name} was moved or changed after the audit began; put it back, or submit the "
                "audit again",
                code="changed_file",
                field=field,
            )


def copy_file(source: Path, target: Path, *, max_bytes: int, field: SourceField) -> None:
    """Copy a file of somebody else's, by the resolved path at which it was checked.

    Raises:
        SourceError: unreadable_file, where it is too large; not_permitted, where it was exchanged
            for a link or cannot be read.
    """
    try:
        with open_resolved(source) as file, target.open("xb") as copy:
            content = file.read(max_bytes + 1)
            copy.write(content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise SourceError(
            f"{source.name} cannot be read: {error.strerror or error}",
            code="not_permitted",
            field=field,
        ) from error
    if len(content) > max_bytes:
        raise SourceError(
            f"{source.name} has more than {max_bytes:,} bytes", code="unreadable_file", field=field
        )


def links(folder: Path) -> list[str]:
    """Return the names of the files that are links."""
    return sorted(path.name for path in folder.iterdir() if path.is_symlink())


def fingerprints(files: dict[str, Path]) -> dict[str, list[int]]:
    """Return size and time of change (ns) of each file: what tells cheaply that it changed."""
    return {name: _fingerprint(path) for name, path in files.items()}


def _fingerprint(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def digest(files: dict[str, Path]) -> str:
    """Return the sha256 over the names, sizes and bytes of all files."""
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        with open_resolved(path) as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def stage_folder(
    files: dict[str, Path], target: Path, *, fill: Callable[[dict[str, Path], Path], None]
) -> None:
    """Fill a folder under a temporary name, then rename it; another process may be first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=".staging-", suffix=".partial"
    ) as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        fill(files, content)
        for name in links(content):
            _link_within(content / name, cache_dir=target.parent.parent, target=target)
        write_json(content / LINKS, {name: _fingerprint(files[name]) for name in links(content)})
        try:
            content.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def _link_within(link: Path, *, cache_dir: Path, target: Path) -> None:
    """Let a link to a file of the cache say the way from the folder's place to come.

    The data directory can then be moved, and restored elsewhere, with all that is in it.
    """
    real = link.resolve()
    if real.is_relative_to(cache_dir.resolve()):
        link.unlink()
        link.symlink_to(os.path.relpath(real, target.parent.resolve() / target.name))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that other processes may be reading: all of it or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".partial", delete=False
    ) as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
    Path(file.name).replace(path)
