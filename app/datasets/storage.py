"""Where the bytes of datasets lie: uploads, and what was fetched from elsewhere."""

import hashlib
from pathlib import Path

from app.references import HubDatasetReference


def upload_path(data_dir: Path, dataset_id: str, file_format: str) -> Path:
    """Return the path of an upload's original file."""
    return data_dir / "datasets" / dataset_id / f"original.{file_format}"


def cache_folder(data_dir: Path) -> Path:
    """Return where resolved models and datasets are kept."""
    return data_dir / "cache"


def hub_table_path(cache_dir: Path, pinned: HubDatasetReference) -> Path:
    """Return the path of the Parquet file that a split of the hub was written to.

    Args:
        cache_dir: where resolved datasets are kept.
        pinned: the reference with a commit as its revision.
    """
    key = hashlib.sha256(str(pinned).encode()).hexdigest()[:32]
    return cache_dir / "datasets" / f"{key}.parquet"


def fetched_path(cache_dir: Path, sha256: str, file_format: str) -> Path:
    """Return the path of a file that was fetched from a web address or an object store."""
    return cache_dir / "datasets" / f"{sha256}.{file_format}"
