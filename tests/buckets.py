"""A bucket of moto's server, and the settings of processes that share their files by it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from app import shared_files
from app.settings import Settings
from app.shared_files import share_files

NAME = "winnow-files"
PREFIX = "lab/one"


@dataclass
class MotoBucket:
    """One bucket."""

    endpoint: str
    client: Any = field(repr=False)
    prefix: str = PREFIX

    @property
    def settings(self) -> dict[str, str]:
        """What a process is set to, by the names of settings."""
        return {
            "artifacts": f"s3://{NAME}/{self.prefix}",
            "s3_endpoint": self.endpoint,
            "s3_region": "us-east-1",
            "s3_access_key": "operator",
            "s3_secret_key": "hidden",
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same by the names of variables."""
        return {f"WINNOW_{name.upper()}": value for name, value in self.settings.items()}

    def names(self, folder: str = "") -> list[str]:
        """The objects below a folder of the data directory, by their paths there."""
        pages = self.client.get_paginator("list_objects_v2")
        return [
            item["Key"].removeprefix(f"{self.prefix}/")
            for page in pages.paginate(Bucket=NAME, Prefix=f"{self.prefix}/{folder}")
            for item in page.get("Contents", ())
        ]

    def put(self, name: str, content: bytes = b"x") -> None:
        """Let there be an object, by its path in the data directory."""
        self.client.put_object(Bucket=NAME, Key=f"{self.prefix}/{name}", Body=content)

    def clear(self) -> None:
        """Remove all objects, of this folder and others."""
        for item in self.client.list_objects_v2(Bucket=NAME).get("Contents", ()):
            self.client.delete_object(Bucket=NAME, Key=item["Key"])

    @contextmanager
    def refusing(self, action: str) -> Iterator[None]:
        """Let the store refuse an action, as s3:PutObject, whoever asks for it."""
        denied = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [denied]}
        self.client.put_bucket_policy(Bucket=NAME, Policy=json.dumps(policy))
        try:
            yield
        finally:
            self.client.delete_bucket_policy(Bucket=NAME)


@contextmanager
def moto_bucket() -> Iterator[MotoBucket]:
    """Run a store with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    client.create_bucket(Bucket=NAME)
    try:
        yield MotoBucket(f"http://{host}:{port}", client)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def bucket() -> Iterator[MotoBucket]:
    """A store for the tests of a module."""
    with moto_bucket() as bucket:
        yield bucket


@pytest.fixture
def in_bucket(settings: Settings, bucket: MotoBucket) -> Iterator[Settings]:
    """Settings of a machine that shares its files by a bucket, which is empty."""
    bucket.clear()
    shared = Settings.model_validate(settings.model_dump() | bucket.settings)
    share_files(shared)
    yield shared
    shared_files._buckets.clear()
