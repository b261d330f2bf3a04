"""Folders of other people's: what is exchanged between a check and an opening is not followed."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.audits import checks
from app.datasets.columns import ColumnNames
from app.datasets.files import DatasetLimits, read_dataset
from app.opening import open_resolved, path_of
from app.references import FileReference, InvalidReference, resolve_file
from app.settings import Settings
from tests.app.conftest import api, client, new_client
from tests.factories import request_body
from workers.sources import local, staging
from workers.sources.errors import SourceError
from workers.sources.local import resolve_local

__all__ = ["api", "client", "new_client"]

TABLE = b"text,label\ngood,a\nbad,b\n"
SECRET = b"secret,label\nkey,1\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "train.csv").write_bytes(SECRET)
    (tmp_path / "root" / "folder" / "train.csv").write_bytes(TABLE)
    return tmp_path / "root"


def swap_file(root: Path) -> None:
    path = root / "folder" / "train.csv"
    path.unlink()
    path.symlink_to(root.parent / "outside" / "train.csv")


def swap_folder(root: Path) -> None:
    (root / "folder").rename(root / "moved")
    (root / "folder").symlink_to(root.parent / "outside")


def swap_for_a_pipe(root: Path) -> None:
    path = root / "folder" / "train.csv"
    path.unlink()
    os.mkfifo(path)


SWAPS = [swap_file, swap_folder, swap_for_a_pipe]


@pytest.mark.parametrize("swap", SWAPS)
def test_what_was_exchanged_since_the_check_is_not_opened(
    root: Path, swap: Callable[[Path], None]
) -> None:
    path = resolve_file(root / "folder" / "train.csv", [root])
    swap(root)
    with pytest.raises(OSError, match=r"train\.csv|folder"):
        open_resolved(path)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_dataset_that_is_exchanged_in_the_middle_of_resolving_is_refused(
    root: Path, swap: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchanging(path: Path) -> object:
        swap(root)
        return open_resolved(path)

    monkeypatch.setattr(local, "open_resolved", exchanging)
    reference = FileReference(root / "folder" / "train.csv")
    with pytest.raises(SourceError) as caught:
        resolve_local(reference, roots=[root], max_bytes=1000)
    assert caught.value.code == "not_permitted"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("swap", SWAPS)
def test_a_dataset_that_was_resolved_stays_the_one_that_was_checked(
    root: Path, swap: Callable[[Path], None]
) -> None:
    """It is read several times; every time it is the open file, whatever its name leads to."""
    resolved = resolve_local(
        FileReference(root / "folder" / "train.csv"), roots=[root], max_bytes=1000
    )
    swap(root)
    for _ in range(2):
        batches = read_dataset(
            resolved.path, format="csv", columns=ColumnNames(), limits=DatasetLimits()
        )
        assert [row["text"] for batch in batches for row in batch.to_pylist()] == ["good", "bad"]


def test_a_file_of_a_model_that_is_exchanged_while_it_is_copied_is_refused(root: Path) -> None:
    path = resolve_file(root / "folder" / "train.csv", [root])
    swap_file(root)
    with pytest.raises(SourceError) as caught:
        staging.copy_file(path, root.parent / "copy", max_bytes=1000, field="model")
    assert caught.value.code == "not_permitted"


def test_a_race_against_a_folder_that_is_exchanged_all_the_time_is_never_lost(root: Path) -> None:
    """One thread moves a link to and fro in the folder's place while another resolves and reads."""
    over = threading.Event()
    link = root / "link"
    link.symlink_to(root.parent / "outside")

    def exchange() -> None:
        while not over.is_set():
            (root / "folder").rename(root / "moved")
            link.rename(root / "folder")
            (root / "folder").rename(link)
            (root / "moved").rename(root / "folder")

    thread = threading.Thread(target=exchange)
    thread.start()
    outcomes = {"read": 0, "refused": 0}
    try:
        for _ in range(2000):
            try:
                path = resolve_file(root / "folder" / "train.csv", [root])
                with open_resolved(path) as file:
                    assert path_of(file, path).read_bytes() == TABLE
            except (InvalidReference, OSError):
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
    finally:
        over.set()
        thread.join()
    assert outcomes["read"] > 0
    assert outcomes["refused"] > 0


def test_links_within_the_roots_are_followed_at_the_check(root: Path) -> None:
    (root / "by name").symlink_to(root / "folder")
    path = resolve_file(root / "by name" / "train.csv", [root])
    with open_resolved(path) as file:
        assert file.read() == TABLE


def test_the_file_is_closed_with_what_holds_it(root: Path) -> None:
    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = num_open()
    for _ in range(50):
        resolve_local(FileReference(root / "folder" / "train.csv"), roots=[root], max_bytes=1000)
        with pytest.raises(FileNotFoundError):
            open_resolved(root / "folder" / "none.csv")
        with pytest.raises(FileNotFoundError):
            open_resolved(root / "none" / "none.csv")
    assert num_open() <= before + 1


@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_that_is_exchanged_while_a_request_is_checked_tells_nothing(
    client: TestClient,
    settings: Settings,
    swap: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the names of the columns of a file outside would stand in the refusal."""
    (root,) = settings.file_roots
    (root / "folder").mkdir()
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "train.csv").write_bytes(SECRET)
    (root / "folder" / "train.csv").write_bytes(TABLE)

    def exchanging(path: Path) -> object:
        swap(root)
        return open_resolved(path)

    monkeypatch.setattr(checks, "open_resolved", exchanging)
    reference = {"reference": (root / "folder" / "train.csv").as_uri()}
    answer = client.post("/v1/audits", json=request_body(train=reference))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "#/train/reference"
    assert "secret" not in answer.text
