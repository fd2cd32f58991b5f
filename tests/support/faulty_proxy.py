"""HTTP proxy in front of an S3 server that counts the bytes read and injects faults, drawn per request from a seed."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

KINDS = ("503", "stall", "truncate", "reset")
BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Proxy:
    """Forwards requests to `upstream` (host:port).

    gets, bytes: GETs per object and bytes of the bodies sent, by bucket/key
    faults: faults injected, by kind
    rate: fraction of the requests by `methods` that fail, each by one of `kinds`; the server may have executed a
    request that the client sees stalled, truncated or reset
    stall: seconds of silence of a stalled response
    delay: seconds before each response
    """

    def __init__(self, upstream: str, rate: float = 0.0, seed: int = 0, stall: float = 3.0) -> None:
        self.upstream = upstream
        self.rate = rate
        self.stall = stall
        self.delay = 0.0
        self.kinds: tuple[str, ...] = KINDS
        self.methods: tuple[str, ...] = ("GET", "HEAD")
        self.gets: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self._draws = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset_counters(self) -> None:
        """Set all counters to 0."""
        with self._lock:
            self.gets.clear()
            self.bytes.clear()
            self.faults.clear()
            self.log.clear()

    def tars(self) -> tuple[int, int]:
        """(GETs, bytes) of all tars."""
        named = [key for key in self.gets if key.endswith(".tar")]
        return sum(self.gets[key] for key in named), sum(self.bytes[key] for key in named)

    def draw(self) -> str | None:
        """Kind of the fault for the next request; None for no fault."""
        with self._lock:
            if self._draws.random() >= self.rate:
                return None
            kind = self._draws.choice(self.kinds)
            self.faults[kind] += 1
            return kind

    def count(self, key: str, requested: str) -> None:
        with self._lock:
            self.gets[key] += 1
            self.log.append((key, requested))

    def sent(self, key: str, length: int) -> None:
        with self._lock:
            self.bytes[key] += length

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


def _handler_of(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        owner = proxy

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Proxy
    _upstream: HTTPConnection | None = None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        key = parts.path.lstrip("/")
        is_object = self.command == "GET" and "/" in key.rstrip("/") and "list-type" not in parts.query
        if is_object:
            self.owner.count(key, self.headers.get("Range", ""))
        fault = self.owner.draw() if self.command in self.owner.methods else None
        if fault == "reset":
            self._reset()
            return
        if fault == "503":
            self._answer(503, [("Content-Type", "application/xml")], BUSY)
            return
        status, headers, content = self._ask(body)
        if self.owner.delay:
            time.sleep(self.owner.delay)
        if fault is not None and not content:
            self._reset()
            return
        kept = len(content) * 2 // 3 if fault else len(content)
        if is_object:
            self.owner.sent(key, kept)
        self._answer(status, headers, content[:kept], len(content))
        if fault == "stall":
            self._wait()
        if fault:
            self._reset() if fault == "stall" else self._end()

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self._upstream is None:
            self._upstream = HTTPConnection(self.owner.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
        self._upstream.request(self.command, self.path, body or None, headers)
        answer: HTTPResponse = self._upstream.getresponse()
        content = answer.read()
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in HOP]
        if self.command == "HEAD":
            kept.append(("Content-Length", answer.getheader("Content-Length", "0")))
        return answer.status, kept, content

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def _wait(self) -> None:
        """Send nothing until the client closes the connection or the stall ends."""
        self.connection.settimeout(self.owner.stall)
        with suppress(OSError):
            self.connection.recv(1)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end()

    def _end(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


@contextmanager
def proxied(upstream: str, rate: float = 0.0, seed: int = 0, stall: float = 3.0) -> Iterator[Proxy]:
    """Yield a Proxy in front of `upstream` (host:port)."""
    proxy = Proxy(upstream, rate, seed, stall)
    try:
        yield proxy
    finally:
        proxy.close()
