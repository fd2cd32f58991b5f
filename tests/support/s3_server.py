"""A real S3 endpoint in this process, for tests: moto's server, and the environment that s3fs looks at."""

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
    """Root url of an empty bucket. Skips where moto or s3fs is missing."""
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
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # tests of a dead server need not wait for ten tries
        forget()
        bucket = f"corpus{next(NUMBERS)}"
        root = f"s3://{bucket}"
        storage.filesystem(root).mkdir(bucket)
        SERVERS[root] = server
        try:
            yield root
        finally:
            SERVERS.pop(root, None)
            forget()
            server.stop()


@contextmanager
def faulty_s3(rate: float = 0.0, seed: int = 0) -> Iterator[tuple[str, Proxy]]:
    """(root url of an empty bucket, the proxy in front of it), which counts and, at `rate`, fails.

    Readers, also those in other processes, give a silent connection up after 1 s and try again at once.
    """
    with s3_server() as root, pytest.MonkeyPatch.context() as patch:
        host, port = SERVERS[root].get_host_and_port()
        with proxied(f"{host}:{port}", rate, seed) as proxy:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            patch.setenv("DROMOS_READ_TIMEOUT", "1")
            patch.setenv("DROMOS_READ_BACKOFF", "0.02")
            forget()
            yield root, proxy
            forget()


def forget() -> None:
    """Look at the environment anew."""
    import s3fs

    object_store.forget()
    s3fs.S3FileSystem.clear_instance_cache()


def stop(root: str, patch: pytest.MonkeyPatch) -> None:
    """From now on nothing answers; the client gives up soon, to save time."""
    import s3fs

    patch.setattr(s3fs.S3FileSystem, "retries", 1)
    patch.setenv("DROMOS_READ_TRIES", "2")
    patch.setenv("DROMOS_READ_BACKOFF", "0.01")
    SERVERS[root].stop()
