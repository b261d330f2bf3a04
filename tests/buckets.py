"""A bucket of moto's server, and the settings of processes that share their files by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

NAME = "winnow-files"
PREFIX = "lab/one"


@dataclass
class MotoBucket:
    """One bucket."""

    endpoint: str
    client: Any = field(repr=False)

    @property
    def settings(self) -> dict[str, str]:
        """What a process is set to, by the names of settings."""
        return {
            "artifacts": f"s3://{NAME}/{PREFIX}",
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
            item["Key"].removeprefix(f"{PREFIX}/")
            for page in pages.paginate(Bucket=NAME, Prefix=f"{PREFIX}/{folder}")
            for item in page.get("Contents", ())
        ]


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
