"""A real S3 endpoint in this process, for tests: moto's server, and the environment that s3fs looks at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from data_pipeline import storage

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
        storage._filesystem_of.cache_clear()
        bucket = f"corpus{next(NUMBERS)}"
        root = f"s3://{bucket}"
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        storage.filesystem(root).mkdir(bucket)
        SERVERS[root] = server
        try:
            yield root
        finally:
            del SERVERS[root]
            storage._filesystem_of.cache_clear()
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()


def stop(root: str, patch: pytest.MonkeyPatch) -> None:
    """From now on nothing answers; the client gives up at once, to save time."""
    import s3fs

    patch.setattr(s3fs.S3FileSystem, "retries", 1)
    SERVERS[root].stop()
