"""A backup of a service whose files are in a bucket: its objects, for a bucket or for a disk."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from app.audits.models import Audit
from app.backup import BackupRefused, back_up, restore
from app.db import make_engine
from app.settings import Settings
from app.shared_files import WHOLE, fetch_folder
from tests.buckets import MotoBucket, bucket, in_bucket
from tests.factories import make_finished_audit
from tests.operations.test_backup import SMALL, check_files_and_finish, request_for, running

__all__ = ["bucket", "in_bucket"]


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_service_at_work_goes_on_in_another_bucket_to_the_byte(
    bucket: MotoBucket, tmp_path: Path
) -> None:
    """No file is left of the first machine, and none of its bucket."""
    bucket.clear()
    (tmp_path / "root").mkdir()
    environment = SMALL | bucket.environment | {"WINNOW_FILE_ROOTS": str(tmp_path / "root")}
    environment["WINNOW_SAMPLES_PER_SHARD"] = "100"
    request = request_for(tmp_path / "root")
    with running(tmp_path / "original", environment) as original:
        checks = original.http.get("/readyz").json()["checks"]
        assert checks["bucket"]["ok"], checks
        done = original.finish(original.submit(**request))
        assert done["state"] == "succeeded", done
        half_done = original.submit(**request)
        original.reach(half_done, "gradients")
        winnow("backup", tmp_path / "copy", "--data-dir", original.data_dir, **environment)
    bucket.clear()
    shutil.rmtree(tmp_path / "original")

    environment["WINNOW_ARTIFACTS"] = "s3://winnow-files/lab/other"
    winnow("restore", tmp_path / "copy", "--data-dir", tmp_path / "restored", **environment)
    with running(tmp_path / "restored", environment) as restored:
        check_files_and_finish(restored, done=done, half_done=half_done)


def winnow(*arguments: str | Path, **environment: str) -> None:
    """Run the command as an operator does."""
    done = subprocess.run(
        [Path(sys.executable).with_name("winnow"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def empty_database(engine: Engine) -> Iterator[Engine]:
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("CREATE DATABASE elsewhere"))
        elsewhere = make_engine(
            engine.url.set(database="elsewhere").render_as_string(hide_password=False)
        )
        yield elsewhere
        elsewhere.dispose()
        connection.execute(text("DROP DATABASE elsewhere"))


@pytest.fixture
def audit(engine: Engine, in_bucket: Settings, bucket: MotoBucket) -> Audit:
    """One whose files no machine has any more; a model of the hub is there too."""
    audit = make_finished_audit(engine, in_bucket)
    data = in_bucket.data_dir
    for path in (data / "audits").rglob("*"):
        if path.is_file():
            bucket.put(str(path.relative_to(data)), path.read_bytes())
    shutil.rmtree(data / "audits")
    for name in ("config.json", WHOLE):
        bucket.put(f"cache/models/m/{name}")
    bucket.put("notes.txt", b"somebody else's")
    return audit


def place(in_bucket: Settings, name: str, *, artifacts: str | None) -> Settings:
    update = {"data_dir": in_bucket.data_dir.with_name(name), "artifacts": artifacts}
    return in_bucket.model_copy(update=update)


def test_it_is_set_up_in_another_bucket(
    engine: Engine,
    empty_database: Engine,
    in_bucket: Settings,
    bucket: MotoBucket,
    audit: Audit,
) -> None:
    copy = in_bucket.data_dir.with_name("copy")
    names = {name for name in bucket.names() if name != "notes.txt"}
    manifest = back_up(engine, in_bucket, copy, with_cache=True)
    assert (manifest.num_files, manifest.in_bucket) == (len(names), True)
    assert manifest.num_bytes > 0
    there = place(in_bucket, "there", artifacts="winnow-files/lab/other")
    assert restore(empty_database, there, copy) == []
    assert {*replace(bucket, prefix="lab/other").names()} == names
    with Session(empty_database) as session:
        assert session.get_one(Audit, audit.id).state == "succeeded"
    model = there.data_dir / "cache" / "models" / "m"
    assert fetch_folder(model)
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_it_is_set_up_on_a_disk(
    engine: Engine,
    empty_database: Engine,
    in_bucket: Settings,
    audit: Audit,
) -> None:
    copy = in_bucket.data_dir.with_name("copy")
    back_up(engine, in_bucket, copy, with_cache=True)
    there = place(in_bucket, "there", artifacts=None)
    assert restore(empty_database, there, copy) == []
    files = [path.name for path in there.data_dir.rglob("*") if path.is_file()]
    assert {"suspects.parquet", "config.json"} <= {*files}
    assert WHOLE not in files


def test_what_is_missing_in_it_is_named(
    engine: Engine,
    empty_database: Engine,
    in_bucket: Settings,
    bucket: MotoBucket,
    audit: Audit,
) -> None:
    copy = in_bucket.data_dir.with_name("copy")
    (table,) = [name for name in bucket.names("audits") if name.endswith(".parquet")]
    bucket.client.delete_object(Bucket="winnow-files", Key=f"lab/one/{table}")
    back_up(engine, in_bucket, copy, with_cache=False)
    assert not (copy / "files" / "cache").exists()
    there = place(in_bucket, "there", artifacts="winnow-files/lab/other")
    assert restore(empty_database, there, copy) == [audit.id]


def test_a_place_that_it_does_not_fit_is_refused(
    engine: Engine,
    empty_database: Engine,
    in_bucket: Settings,
    audit: Audit,
) -> None:
    """One that holds files, and a bucket for the copy of a disk."""
    copy = in_bucket.data_dir.with_name("copy")
    back_up(engine, in_bucket, copy, with_cache=True)
    with pytest.raises(BackupRefused, match=r"WINNOW_ARTIFACTS\) holds audits, cache"):
        restore(empty_database, in_bucket, copy)
    on_disk = place(in_bucket, "disk", artifacts=None)
    on_disk.data_dir.mkdir()
    back_up(engine, on_disk, copy.with_name("d"), with_cache=True)
    there = place(in_bucket, "there", artifacts="winnow-files/lab/other")
    with pytest.raises(BackupRefused, match="without WINNOW_ARTIFACTS"):
        restore(empty_database, there, copy.with_name("d"))
