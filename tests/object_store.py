"""An object store on this host, and runs that are moved there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
from moto.server import ThreadedMotoServer

from tests.small_data import SPLITS
from trainer.location import locate

BUCKET = "s3://bucket"
NOT_SECRET = "testing"  # credentials that the server here does not look at


def s3_server() -> Iterator[None]:
    """A server that speaks S3, on this host, for this process and those that it starts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": NOT_SECRET, "AWS_SECRET_ACCESS_KEY": NOT_SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with mock.patch.dict(os.environ, names | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}):
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know the server before
            fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
            yield
    finally:
        server.stop()


def upload(folder: Path, url: str) -> None:
    for split in SPLITS:
        for path in (folder / split).iterdir():
            (locate(url) / split / path.name).write_bytes(path.read_bytes())


def moved(plain: dict[str, Any], folder: Path, url: str) -> dict[str, Any]:
    """The run with data and output in a store."""
    text = json.dumps(plain).replace(str(folder), url)
    moved: dict[str, Any] = json.loads(text)
    return moved
