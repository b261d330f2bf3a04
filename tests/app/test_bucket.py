"""Files that are shared by a bucket: whole or not there, asked after at every reading."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.bucket import Bucket
from app.errors import NotReady
from app.settings import Settings
from tests.buckets import MotoBucket, moto_bucket


@pytest.fixture(scope="module")
def store() -> Iterator[MotoBucket]:
    with moto_bucket() as store:
        yield store


@pytest.fixture
def machines(store: MotoBucket, tmp_path: Path) -> list["Machine"]:
    for key in store.names():
        store.client.delete_object(Bucket="winnow-files", Key=f"lab/one/{key}")
    return [Machine(tmp_path / name, store.endpoint) for name in ("one", "other")]


class Machine(Bucket):
    """One with a data directory of its own."""

    def __init__(self, data_dir: Path, endpoint: str) -> None:
        self.data_dir = data_dir
        super().__init__(
            name="winnow-files",
            prefix="lab/one",
            data_dir=data_dir,
            endpoint=endpoint,
            region="us-east-1",
            access_key="operator",
            secret_key="hidden",
        )

    def write(self, name: str, content: bytes) -> Path:
        path = self.data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def put(self, name: str, content: bytes) -> None:
        self.publish(self.write(name, content))

    def read(self, name: str) -> bytes | None:
        path = self.data_dir / name
        return path.read_bytes() if self.fetch(path) else None


Machines = list[Machine]


def test_what_one_machine_publishes_the_other_reads(machines: Machines, store: MotoBucket) -> None:
    one, other = machines
    assert other.read("audits/a/facts/1") is None
    one.put("audits/a/facts/1", b"first")
    assert other.read("audits/a/facts/1") == b"first"
    assert store.names() == ["audits/a/facts/1"]
    assert [path.name for path in other.data_dir.rglob("*") if path.is_file()] == ["1"]


def test_what_was_written_anew_is_fetched_anew(machines: Machines) -> None:
    """By whoever has an old copy, and by whoever wrote the old one."""
    one, other = machines
    one.put("audits/a/prepared", b"first")
    assert other.read("audits/a/prepared") == b"first"
    other.put("audits/a/prepared", b"second, of another worker")
    assert one.read("audits/a/prepared") == b"second, of another worker"


def test_what_did_not_change_is_not_sent_again(machines: Machines) -> None:
    one, other = machines
    one.put("audits/a/large", b"x" * 1000)
    for machine in machines:
        assert machine.read("audits/a/large")
        before = (machine.data_dir / "audits/a/large").stat()
        assert machine.read("audits/a/large")
        after = (machine.data_dir / "audits/a/large").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    # another process of the machine wrote there meanwhile
    other.write("audits/a/large", b"half")
    assert other.read("audits/a/large") == b"x" * 1000


def test_a_folder_is_there_when_all_of_it_is(machines: Machines, store: MotoBucket) -> None:
    one, other = machines
    one.write("weights.bin", b"w")
    folder = one.write("cache/models/m/config.json", b"{}").parent
    (folder / "weights").symlink_to("../../../weights.bin")
    (folder / "links.json").write_bytes(b"of this machine")
    there = other.data_dir / "cache/models/m"
    store.client.put_object(Bucket="winnow-files", Key="lab/one/cache/models/m/a", Body=b"half")
    assert not other.fetch_folder(there)
    store.client.delete_object(Bucket="winnow-files", Key="lab/one/cache/models/m/a")
    one.publish_folder(folder, once=True, without=frozenset({"links.json"}))
    assert other.fetch_folder(there)
    found = {path.name: path.read_bytes() for path in there.iterdir()}
    assert found == {"config.json": b"{}", "weights": b"w"}
    assert not (there / "weights").is_symlink()
    one.write("cache/models/m/later", b"")
    one.publish_folder(folder, once=True, without=frozenset())
    assert not [key for key in store.names() if key.endswith("later")]
    one.publish_folder(folder, once=False, without=frozenset())
    assert [key for key in store.names() if key.endswith("later")]


def test_what_is_removed_is_gone_for_all_and_nothing_else(
    machines: Machines, store: MotoBucket
) -> None:
    one, other = machines
    for name in ("audits/a/x", "audits/a/deep/y", "audits/ab/z"):
        one.put(name, b"12345")
    assert one.num_bytes(one.data_dir / "audits/a") == 10
    assert other.remove(other.data_dir / "audits/a")
    assert store.names() == ["audits/ab/z"]
    assert one.num_bytes(one.data_dir / "audits/a") == 0


def test_a_store_that_is_away_is_said_so(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(NotReady) as caught:
        machine.read("audits/a/x")
    assert "winnow-files" in (caught.value.detail or "")
    with pytest.raises(NotReady):
        machine.put("audits/a/x", b"")
    assert not machine.remove(tmp_path / "audits/a")


def test_a_bucket_that_is_not_there_is_said_so(store: MotoBucket, tmp_path: Path) -> None:
    machine = Machine(tmp_path, store.endpoint)
    machine._name = "nobodys"
    with pytest.raises(NotReady) as caught:
        machine.put("audits/a/x", b"")
    assert "nobodys" in (caught.value.detail or "")


@pytest.mark.parametrize("value", ["bucket/folder", "s3://", "https://bucket", "s3:///"])
def test_a_setting_that_names_no_bucket_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/folder"):
        Settings(artifacts=value)
    assert Settings(artifacts="").artifacts is None
    assert Settings(artifacts="s3://bucket/a/b/").artifacts == "bucket/a/b"


@pytest.mark.parametrize("root", ["bucket", "bucket/files", "bucket/files/audits"])
def test_what_callers_may_read_is_no_place_for_files(root: str) -> None:
    """All tenants' files are there."""
    with pytest.raises(ValueError, match="overlap"):
        Settings(artifacts="s3://bucket/files", s3_roots=(root,))
    assert Settings(artifacts="s3://bucket/files", s3_roots=("bucket/sets", "bucket/files-2"))
