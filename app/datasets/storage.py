"""Where the bytes of uploaded datasets lie."""

from pathlib import Path


def upload_path(data_dir: Path, dataset_id: str, file_format: str) -> Path:
    """Return the path of an upload's original file."""
    return data_dir / "datasets" / dataset_id / f"original.{file_format}"
