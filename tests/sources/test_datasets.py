"""Datasets from uploads, files and a hub, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.datasets.files import DatasetLimits
from app.references import (
    DatasetReference,
    FileReference,
    HubDatasetReference,
    UploadReference,
)
from tests.hub import LoopbackHub
from workers.sources.datasets import resolve_dataset
from workers.sources.errors import SourceError
from workers.sources.hub import Hub
from workers.sources.local import ResolvedDataset

Resolve = Callable[[DatasetReference], ResolvedDataset]

TRAIN = b'text,label\ngood,1\n"bad, very\nbad",0\n'
TEST = b"text,label\nfine,1\n"


def parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def rows_of(resolved: ResolvedDataset) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(resolved.path).to_pylist()
    return rows


@pytest.fixture
def resolve(tmp_path: Path, hub: Hub) -> Resolve:
    upload = ResolvedDataset(path=tmp_path / "upload.csv", format="csv", revision="abc")

    def resolve(reference: DatasetReference) -> ResolvedDataset:
        return resolve_dataset(
            reference,
            find_upload={"ds_1": upload}.__getitem__,
            roots=[tmp_path / "data"],
            hub=hub,
            cache_dir=tmp_path / ".winnow" / "cache",
            limits=DatasetLimits(max_rows=10),
            max_bytes=10_000,
        )

    return resolve


def test_an_upload_is_looked_up_by_its_id(resolve: Resolve, tmp_path: Path) -> None:
    assert resolve(UploadReference("ds_1")).path == tmp_path / "upload.csv"
    with pytest.raises(KeyError, match="ds_2"):
        resolve(UploadReference("ds_2"))


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        return folder

    def test_the_file_itself_is_the_dataset(self, resolve: Resolve, folder: Path) -> None:
        path = folder / "train.csv"
        path.write_bytes(TRAIN)
        first = resolve(FileReference(path))
        assert first.path.samefile(path)
        assert first.format == "csv"
        path.write_bytes(TEST)
        assert resolve(FileReference(path)).revision != first.revision

    @pytest.mark.parametrize(
        ("name", "content", "code"),
        [
            ("big.csv", b"x" * 10_001, "too_large"),
            ("train.zip", b"PK\x03\x04", "unsupported_dataset"),
            ("train.parquet", b"no", "unsupported_dataset"),
        ],
    )
    def test_refused_files(
        self, resolve: Resolve, folder: Path, name: str, content: bytes, code: str
    ) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(SourceError) as caught:
            resolve(FileReference(folder / name))
        assert caught.value.code == code
        assert caught.value.field == "dataset"

    def test_a_folder_a_missing_file_and_one_outside(
        self, resolve: Resolve, folder: Path, tmp_path: Path
    ) -> None:
        for path, message in [
            (folder, "is a folder"),
            (folder / "none.csv", "no such file"),
            (tmp_path / "secret.csv", "outside the folders"),
        ]:
            with pytest.raises(SourceError, match=message) as caught:
                resolve(FileReference(path))
            assert caught.value.code == "invalid_reference"


class TestHub:
    def test_a_split_by_file_names(self, resolve: Resolve, server: LoopbackHub) -> None:
        """The split's files alone are downloaded, and the rows are all there, in order."""
        commit = server.push("datasets", "lab/films", {"train.csv": TRAIN, "test.csv": TEST})
        resolved = resolve(HubDatasetReference("lab/films"))
        assert resolved.revision == commit
        assert rows_of(resolved) == [
            {"text": "good", "label": 1},
            {"text": "bad, very\nbad", "label": 0},
        ]
        assert not any("test.csv" in request.path for request in server.requests)

    def test_a_configuration_of_the_card(self, resolve: Resolve, server: LoopbackHub) -> None:
        card = b"""---
configs:
- config_name: short
  data_files:
  - split: train
    path: short/*.parquet
- config_name: long
  data_files:
  - split: validation
    path: [long/b.parquet, long/a.parquet]
---
# Films
"""
        server.push(
            "datasets",
            "lab/films",
            {
                "README.md": card,
                "short/x.parquet": parquet(text=["a", "b"], label=["x", "y"]),
                "long/a.parquet": parquet(text=["a"], label=[1]),
                "long/b.parquet": parquet(text=["b"], label=[0]),
                "media/film.mp4": b"film",
            },
        )
        short = resolve(HubDatasetReference("lab/films", config="short"))
        assert [row["label"] for row in rows_of(short)] == ["x", "y"]
        long = resolve(HubDatasetReference("lab/films", config="long", split="validation"))
        assert [row["text"] for row in rows_of(long)] == ["b", "a"]
        assert not any("media" in request.path for request in server.requests)

    def test_json_lines(self, resolve: Resolve, server: LoopbackHub) -> None:
        content = b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
        server.push("datasets", "lab/films", {"data/validation.jsonl": content})
        resolved = resolve(HubDatasetReference("lab/films", split="validation"))
        assert [row["label"] for row in rows_of(resolved)] == ["x", "y"]

    def test_a_pinned_commit_is_not_asked_for_again(
        self, resolve: Resolve, server: LoopbackHub
    ) -> None:
        server.push("datasets", "lab/films", {"train.csv": TRAIN})
        first = resolve(HubDatasetReference("lab/films"))
        server.status = 503
        server.requests.clear()
        assert resolve(HubDatasetReference("lab/films", first.revision)) == first
        assert server.requests == []

    def test_a_branch_moves_and_its_commits_stay(
        self, resolve: Resolve, server: LoopbackHub
    ) -> None:
        server.push("datasets", "lab/films", {"train.csv": TRAIN})
        first = resolve(HubDatasetReference("lab/films"))
        server.push("datasets", "lab/films", {"train.csv": TEST})
        second = resolve(HubDatasetReference("lab/films"))
        assert second.revision != first.revision
        assert len(rows_of(first)) == 2
        assert len(rows_of(second)) == 1

    @pytest.mark.parametrize(
        ("reference", "code", "message"),
        [
            (HubDatasetReference("lab/none"), "not_found", "no such dataset repository"),
            (HubDatasetReference("lab/films", "v9"), "not_found", "no branch, tag or commit"),
            (
                HubDatasetReference("lab/films", split="dev"),
                "not_found",
                "no split 'dev'; there are: train, test",
            ),
            (HubDatasetReference("lab/films", config="x"), "unsupported_dataset", "'x'"),
        ],
    )
    def test_what_is_not_there(
        self,
        resolve: Resolve,
        server: LoopbackHub,
        reference: HubDatasetReference,
        code: str,
        message: str,
    ) -> None:
        server.push("datasets", "lab/films", {"train.csv": TRAIN, "test.csv": TEST})
        with pytest.raises(SourceError, match=message) as caught:
            resolve(reference)
        assert caught.value.code == code

    @pytest.mark.parametrize(
        ("files", "code", "message"),
        [
            ({"films.py": b"evil", "films.zip": b"PK"}, "unsupported_dataset", "no Parquet"),
            ({"train.csv": b"x" * 10_001}, "too_large", "10,001 bytes"),
            ({"train.csv": b"text\n" + b"a\n" * 11}, "too_large", "more than 10 rows"),
            ({"train.csv": b""}, "unsupported_dataset", "cannot be read"),
            ({"train.csv": b"text,label\n"}, "unsupported_dataset", "no rows"),
            ({"train.parquet": b"PAR1PAR1"}, "unsupported_dataset", "cannot be read"),
            ({"train.jsonl": b"{"}, "unsupported_dataset", "cannot be read"),
            ({"train.csv": b"text\n\xff\xfe\n"}, "unsupported_dataset", "cannot be read"),
            (
                {"README.md": b"---\nconfigs: 3\n---\n", "a.csv": TRAIN},
                "unsupported_dataset",
                "cannot be",
            ),
            ({"README.md": b"---\n[\n---\n", "a.csv": TRAIN}, "unsupported_dataset", "cannot be"),
            ({"README.md": b"\xff", "a.csv": TRAIN}, "unsupported_dataset", "cannot be"),
        ],
    )
    def test_refused_repositories(
        self,
        resolve: Resolve,
        server: LoopbackHub,
        files: dict[str, bytes],
        code: str,
        message: str,
    ) -> None:
        server.push("datasets", "lab/films", files)
        with pytest.raises(SourceError, match=message) as caught:
            resolve(HubDatasetReference("lab/films"))
        assert caught.value.code == code

    def test_a_small_file_that_unfolds_beyond_the_limit(
        self, resolve: Resolve, server: LoopbackHub
    ) -> None:
        content = parquet(text=["a" * 5_000] * 4, label=[0, 1, 0, 1])
        assert len(content) < 10_000
        server.push("datasets", "lab/films", {"train.parquet": content})
        with pytest.raises(SourceError, match="bytes or more") as caught:
            resolve(HubDatasetReference("lab/films"))
        assert caught.value.code == "too_large"

    @pytest.mark.parametrize(
        "pattern",
        ["/etc/passwd", "../secret.csv", "http://127.0.0.1/x.csv", "zip://a.csv::b.zip", "~/x.csv"],
    )
    def test_a_card_that_reaches_out_of_its_repository(
        self, resolve: Resolve, server: LoopbackHub, pattern: str
    ) -> None:
        card = f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n"
        server.push("datasets", "lab/films", {"README.md": card.encode(), "train.csv": TRAIN})
        with pytest.raises(SourceError, match="outside the repository") as caught:
            resolve(HubDatasetReference("lab/films"))
        assert caught.value.code == "unsafe_file"

    def test_a_tree_that_reaches_out_of_its_repository(
        self, resolve: Resolve, server: LoopbackHub, tmp_path: Path
    ) -> None:
        server.push("datasets", "lab/films", {"../../../../out.csv": TRAIN, "/out.csv": TRAIN})
        with pytest.raises(SourceError, match="no Parquet"):
            resolve(HubDatasetReference("lab/films"))
        assert not list(tmp_path.rglob("out.csv"))

    def test_nothing_half_done_stays_behind(
        self, resolve: Resolve, server: LoopbackHub, tmp_path: Path
    ) -> None:
        server.push("datasets", "lab/films", {"train.csv": b"text\n" + b"a\n" * 11})
        with pytest.raises(SourceError):
            resolve(HubDatasetReference("lab/films"))
        assert list((tmp_path / ".winnow" / "cache" / "datasets").iterdir()) == []
