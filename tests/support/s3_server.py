"""S3 endpoint in the test process (moto's server), and the environment variables that point s3fs at it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.storage import object_store
from tests.support.faulty_proxy import Proxy, proxied

NUMBERS = itertools.count()  # moto keeps its buckets for as long as the process lives

SERVERS: dict[str, Any] = {}  # root url -> its server


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the root URL of an empty bucket. Skips the test if moto or s3fs is not installed."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")
    pytest.importorskip("moto.server", reason="moto[server] is not installed (extra dev)")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv(
            "AWS_MAX_ATTEMPTS", "1"
        )  # no retries by botocore, so that tests of a dead server are fast
        reset_clients()
        bucket = f"corpus{next(NUMBERS)}"
        root = f"s3://{bucket}"
        storage.filesystem(root).mkdir(bucket)
        SERVERS[root] = server
        try:
            yield root
        finally:
            SERVERS.pop(root, None)
            reset_clients()
            server.stop()


@contextmanager
def faulty_s3(rate: float = 0.0, seed: int = 0) -> Iterator[tuple[str, Proxy]]:
    """Yield (root URL of an empty bucket, proxy in front of its server); see Proxy for `rate`.

    Readers, also those in other processes, close a silent connection after 1 s and retry after 0.02 s.
    """
    with s3_server() as root, pytest.MonkeyPatch.context() as patch:
        host, port = SERVERS[root].get_host_and_port()
        with proxied(f"{host}:{port}", rate, seed) as proxy:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            patch.setenv("DROMOS_READ_TIMEOUT", "1")
            patch.setenv("DROMOS_READ_BACKOFF", "0.02")
            reset_clients()
            yield root, proxy
            reset_clients()


def reset_clients() -> None:
    """Make the next request read the environment variables again."""
    import s3fs

    object_store.clear_filesystems()
    s3fs.S3FileSystem.clear_instance_cache()


def stop(root: str, patch: pytest.MonkeyPatch) -> None:
    """Stop the server of a bucket, and limit the client's retries to save time."""
    import s3fs

    patch.setattr(s3fs.S3FileSystem, "retries", 1)
    patch.setenv("DROMOS_READ_TRIES", "2")
    patch.setenv("DROMOS_READ_BACKOFF", "0.01")
    SERVERS[root].stop()
