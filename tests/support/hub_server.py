"""A local test server that implements the HTTP API of the Hugging Face hub, as huggingface_hub uses it."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "s3cretTokenOfTheTests"
SIGNATURE = "X-Signature=letsAnyoneRead"
LARGE = 4000  # bytes from which a file is in LFS


class Hub:
    """Repositories, and the requests received.

    repositories: ORG/NAME -> {file: content}.
    commits: ORG/NAME -> the newest commit; `main` leads there.
    gated:  repositories that answer 403 without TOKEN. hidden: those that answer "not found" without it.
    breaks: file -> how many of its downloads break in the middle.
    status: if not 0, the answer to every request.
    asked:  (method, path without its query) of every request; fetched: files whose content was sent, whole or in part.
    tokens: paths that came with a token.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.gated: set[str] = set()
        self.hidden: set[str] = set()
        self.breaks: dict[str, int] = {}
        self.status = 0
        self.asked: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.tokens: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """URL of the API; large files come from another host, as with the hub."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit to a repository."""
        self.repositories[name] = files
        content = b"".join(key.encode() + value for key, value in sorted(files.items()))
        self.commits[name] = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        return self.commits[name]

    def forget(self) -> None:
        self.asked.clear()
        self.fetched.clear()
        self.ranges.clear()
        self.tokens.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        owner = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.owner, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "Authorization" in self.headers:
            hub.tokens.add(path)
        if hub.status:
            self._error(hub.status, "", "away")
        elif found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self._lfs(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(found[1], found[2] or "revision", found[3] or "main", allowed)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3], allowed)
        else:
            self._error(404, "", "no such page")

    do_HEAD = do_GET

    def _known(self, name: str, revision: str, allowed: bool) -> bool:
        hub = self.owner
        if name not in hub.repositories or (name in hub.hidden and not allowed):
            self._error(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", hub.commits[name]):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _api(self, name: str, what: str, revision: str, allowed: bool) -> None:
        if not self._known(name, revision, allowed):
            return
        files = self.owner.repositories[name]
        if what == "tree":
            self._json([_entry(path, content) for path, content in files.items()])
            return
        siblings = [{"rfilename": path} for path in files]
        self._json(
            {
                "id": name, "modelId": name, "sha": self.owner.commits[name], "private": False, "tags": [],
                "gated": "manual" if name in self.owner.gated else False, "siblings": siblings,
            }
        )  # fmt: skip

    def _resolve(self, name: str, revision: str, file: str, allowed: bool) -> None:
        hub = self.owner
        if not self._known(name, revision, allowed):
            return
        if name in hub.gated and not allowed:
            self._error(403, "GatedRepo", f"Access to model {name} is restricted")
            return
        content = hub.repositories[name].get(file)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        entry = _entry(file, content)
        headers = {"X-Repo-Commit": hub.commits[name], "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            digest = entry["lfs"]["oid"]
            headers |= {
                "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"',
                "Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/lfs/{digest}?{SIGNATURE}",
                "Content-Length": "0",
            }  # fmt: skip
            self._send(302, headers, b"")
        else:
            self._content(file, content, headers)

    def _lfs(self, digest: str) -> None:
        for files in self.owner.repositories.values():
            for file, content in files.items():
                if hashlib.sha256(content).hexdigest() == digest:
                    self._content(file, content, {"ETag": f'"{digest}"'})
                    return
        self._error(404, "", "no such blob")

    def _content(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        hub = self.owner
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            stop = int(found[2]) + 1 if found[2] else len(content)
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content = content[:stop]
            if self.command == "GET":
                hub.ranges.append(file)
        body = content[start:]
        headers = {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        if self.command == "GET":
            hub.fetched.append(file)
            if hub.breaks.get(file, 0):
                hub.breaks[file] -= 1
                self._send(status, headers, body[: len(body) // 2])
                self._reset()
                return
        self._send(status, headers, body)

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"Content-Length": str(len(body)), "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, headers, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.wfile.write(body)
                self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """An entry of a repository tree."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "oid": blob, "size": len(content), "path": path}
    if len(content) >= LARGE:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()
