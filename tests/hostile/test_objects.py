"""Datasets and models of an S3 store: moto's server, at the endpoint that the operator set."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from transformers import BertForSequenceClassification

from app.references import ObjectReference, parse_dataset_reference, parse_model_reference
from tests.hostile.conftest import resolve_elsewhere
from tests.sources.conftest import tiny_config, write_tokenizer
from workers.sources.errors import SourceError
from workers.sources.hub import Hub
from workers.sources.loading import load_model
from workers.sources.local import ResolvedDataset
from workers.sources.models import ResolvedModel, resolve_model
from workers.sources.objects import ObjectStore

TABLE = b"text,label\ngood,a\nbad,b\n"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str) -> ObjectStore:
    return ObjectStore(
        roots=["data/sets", "models"],
        endpoint=endpoint,
        region="us-east-1",
        access_key="operator",
        secret_key="hidden",
    )


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Any]:
    """Puts objects where references lead."""
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    for name in ("data", "models"):
        client.create_bucket(Bucket=name)

    def put(bucket: str, key: str, body: bytes) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=body)

    yield put
    for name in ("data", "models"):
        for item in client.list_objects_v2(Bucket=name).get("Contents", ()):
            client.delete_object(Bucket=name, Key=item["Key"])


Put = Callable[[str, str, bytes], None]


@pytest.fixture
def fetch(store: ObjectStore, tmp_path: Path) -> Callable[..., ResolvedDataset]:
    def fetch(reference: str, by: ObjectStore = store) -> ResolvedDataset:
        return resolve_elsewhere(reference, tmp_path, store=by)

    return fetch


Fetch = Callable[..., ResolvedDataset]


class TestDatasets:
    def test_a_file_is_kept_under_its_digest(self, fetch: Fetch, bucket: Put) -> None:
        bucket("data", "sets/my films.csv", TABLE)
        found = fetch("s3://data/sets/my%20films.csv")
        assert found.path.read_bytes() == TABLE
        assert (found.format, found.revision) == ("csv", hashlib.sha256(TABLE).hexdigest())
        bucket("data", "sets/my films.csv", TABLE + b"new,a\n")
        assert fetch("s3://data/sets/my%20films.csv").revision != found.revision
        assert found.path.read_bytes() == TABLE

    @pytest.mark.parametrize(
        ("reference", "code", "message"),
        [
            ("s3://data/secret.csv", "invalid_reference", "outside the buckets"),
            ("s3://data/setsandmore/x.csv", "invalid_reference", "outside the buckets"),
            ("s3://other/sets/x.csv", "invalid_reference", "outside the buckets"),
            ("s3://data/sets/none.csv", "not_found", "no such bucket or object"),
            ("s3://models-2/x.csv", "invalid_reference", "outside the buckets"),
            ("s3://data/sets/large.csv", "too_large", "10,000 bytes"),
            ("s3://data/sets/page", "unsupported_dataset", "no known format"),
        ],
    )
    def test_what_is_refused(  # noqa: PLR0917  fixtures and parameters
        self, fetch: Fetch, bucket: Put, tmp_path: Path, reference: str, code: str, message: str
    ) -> None:
        bucket("data", "secret.csv", TABLE)
        bucket("data", "setsandmore/x.csv", TABLE)
        bucket("data", "sets/large.csv", b"x" * 20_000)
        bucket("data", "sets/page", b"<html>")
        with pytest.raises(SourceError, match=message) as caught:
            fetch(reference)
        assert caught.value.code == code
        assert list(tmp_path.rglob("*.csv")) == []

    def test_a_server_without_roots_reads_none(self, fetch: Fetch) -> None:
        with pytest.raises(SourceError, match="WINNOW_S3_ROOTS"):
            fetch("s3://data/sets/x.csv", ObjectStore())

    def test_a_store_that_is_down_is_worth_another_try(self, fetch: Fetch) -> None:
        down = ObjectStore(["data"], "http://127.0.0.1:9", "us-east-1", "a", "b")
        with pytest.raises(SourceError, match="could not be reached") as caught:
            fetch("s3://data/x.csv", down)
        assert (caught.value.code, caught.value.transient) == ("source_unreachable", True)

    def test_without_credentials_it_says_what_the_operator_must_set(
        self, fetch: Fetch, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        nobody = ObjectStore(["data"], endpoint, "us-east-1")
        with pytest.raises(SourceError, match="WINNOW_S3_ACCESS_KEY") as caught:
            fetch("s3://data/x.csv", nobody)
        assert caught.value.code == "not_permitted"

    def test_its_keys_are_shown_nowhere(self, store: ObjectStore) -> None:
        assert "hidden" not in repr(store)
        assert "operator" not in repr(store)


class TestModels:
    @pytest.fixture
    def resolve(self, store: ObjectStore, tmp_path: Path) -> Callable[[str], ResolvedModel]:
        def resolve(reference: str) -> ResolvedModel:
            return resolve_model(
                parse_model_reference(reference),
                adapter=None,
                roots=[],
                hub=Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "hub"),
                store=store,
                cache_dir=tmp_path / "cache",
            )

        return resolve

    @pytest.fixture
    def model(self, tmp_path: Path, bucket: Put) -> Path:
        folder = tmp_path / "model"
        torch.manual_seed(0)
        BertForSequenceClassification(tiny_config()).save_pretrained(folder)
        write_tokenizer(folder)
        for path in folder.iterdir():
            bucket("models", f"tiny/{path.name}", path.read_bytes())
        bucket("models", "tiny/pytorch_model.bin", b"pickle")
        bucket("models", "tiny/modeling_evil.py", b"evil")
        bucket("models", "tiny/deeper/config.json", b"{}")
        return folder

    def test_a_folder_is_pinned_by_its_content_and_loads(
        self, resolve: Callable[[str], ResolvedModel], model: Path, bucket: Put, tmp_path: Path
    ) -> None:
        first = resolve("s3://models/tiny")
        assert resolve("s3://models/tiny/") == first
        load_model(first, labels=[0, 1])
        kept = {path.name for path in (tmp_path / "cache" / "objects").rglob("*")}
        assert not {"pytorch_model.bin", "modeling_evil.py", "deeper"} & kept
        changed = (model / "config.json").read_bytes().replace(b"0.1", b"0.2")
        bucket("models", "tiny/config.json", changed)
        assert resolve("s3://models/tiny").revision != first.revision

    @pytest.mark.parametrize(
        ("reference", "code"),
        [
            ("s3://models/none", "missing_file"),
            ("s3://data/tiny", "invalid_reference"),
            ("s3://models-2/tiny", "invalid_reference"),
        ],
    )
    def test_what_is_refused(
        self, resolve: Callable[[str], ResolvedModel], bucket: Put, reference: str, code: str
    ) -> None:
        with pytest.raises(SourceError) as caught:
            resolve(reference)
        assert caught.value.code == code


def test_a_bucket_cannot_name_another_host() -> None:
    """What parses goes into the path of the operator's endpoint, or before Amazon's own name."""
    reference = parse_dataset_reference("s3://my.bucket/a")
    assert reference == ObjectReference("my.bucket", "a")
