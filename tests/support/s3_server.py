"""S3 endpoint in the test process (moto), and the environment variables that point s3fs at it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.storage import object_store
from tests.support.faulty_proxy import Proxy, proxied


class Server:
    """moto's S3 behind a threaded HTTP server, from its start to `stop`.

    moto's own server is slow: for each request it searches for the service and writes a log line. This one serves only
    S3.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        class Handler(MotoRequestHandler):
            def log_request(self, *_: Any) -> None:
                pass

        self._server = make_server(
            "127.0.0.1", 0, create_backend_app("s3"), threaded=True, request_handler=Handler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """HOST:PORT"""
        host, port = self._server.server_address[:2]
        return f"{host}:{port}"

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


NUMBERS = itertools.count()  # moto keeps its buckets for as long as the process lives

SERVERS: dict[str, Server] = {}  # root url -> its server


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the root URL of an empty bucket. Skips the test if moto or s3fs is not installed."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")
    pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto[server] is not installed (extra dev)")
    server = Server()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.callback(server.stop)
        stack.callback(reset_clients)
        for name in (
            "AWS_PROFILE",
            "AWS_SESSION_TOKEN",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{server.address}")
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
        stack.callback(SERVERS.pop, root)
        yield root


@contextmanager
def faulty_s3(rate: float = 0.0, seed: int = 0) -> Iterator[tuple[str, Proxy]]:
    """Yield (root URL of an empty bucket, proxy in front of its server); see Proxy for `rate`.

    Readers, also those in other processes, close a silent connection after 1 s and retry after 0.02 s.
    """
    with (
        s3_server() as root,
        proxied(SERVERS[root].address, rate, seed) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("DROMOS_READ_TIMEOUT", "1")
        patch.setenv("DROMOS_READ_BACKOFF", "0.02")
        reset_clients()
        yield root, proxy
        reset_clients()


def upload(folder: Path, url: str) -> str:
    """Copy the files below a folder into the store; return `url`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.publish(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


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
