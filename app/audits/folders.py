"""Where an audit's files lie, and how much they take."""

from pathlib import Path

from app.shared_files import num_bytes, remove_folder

# What further rankings are made from; results stay for as long as the audit.
INFLUENCE_FOLDERS = ("influence", "facts", "probes", "validation", "prepared", "scratch")


def audit_folder(data_dir: Path, audit_id: str) -> Path:
    """Return where an audit's files lie."""
    return data_dir / "audits" / audit_id


def influence_bytes(folder: Path) -> int:
    """Return how much the influence files of an audit take, with all that belongs to them."""
    return sum(num_bytes(folder / name) for name in INFLUENCE_FOLDERS)


def remove_influence(folder: Path) -> int:
    """Remove the influence files of an audit, and return how many bytes could not be removed."""
    for name in INFLUENCE_FOLDERS:
        remove_folder(folder / name)
    return influence_bytes(folder)
