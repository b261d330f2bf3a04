"""Where an audit's files lie, and how much they take."""

import shutil
import stat
from pathlib import Path

# What further rankings are made from; results stay for as long as the audit.
INFLUENCE_FOLDERS = ("influence", "facts", "probes", "validation", "prepared", "scratch")


def audit_folder(data_dir: Path, audit_id: str) -> Path:
    """Return where an audit's files lie."""
    return data_dir / "audits" / audit_id


def influence_bytes(folder: Path) -> int:
    """Return how much the influence files of an audit take, with all that belongs to them."""
    return sum(_bytes_in(folder / name) for name in INFLUENCE_FOLDERS)


def remove_influence(folder: Path) -> int:
    """Remove the influence files of an audit, and return how many bytes could not be removed."""
    for name in INFLUENCE_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    return influence_bytes(folder)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # another process cleans up
        if stat.S_ISREG(status.st_mode):
            total += status.st_size
    return total
