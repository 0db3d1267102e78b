"""A Hugging Face Hub for tests: real HTTP on 127.0.0.1 over directories, with faults to order.

It speaks what huggingface_hub's client asks for when it reads a model: /api/models, and /resolve with ETag,
commit and Range. It is no mirror: no git, no xet, no uploads.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass(slots=True)
class Fault:
    """What goes wrong with the next `times` requests whose path contains `path`."""

    path: str
    method: str = "GET"
    status: int | None = None  # answer with this status instead
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # send so many bytes of the body, then hang up
    stall: bool = False  # before hanging up, wait until `Hub.go` is set
    reset: bool = False  # hang up with a TCP reset instead of a clean close
    times: int = 1


@dataclass(slots=True)
class Repo:
    """A repository at one commit. `files` is what is served, `listing` what is promised."""

    files: dict[str, bytes]
    gated: bool = False
    commit: str = ""
    listing: list[dict[str, Any]] = field(default_factory=list)

    def promise(self) -> None:
        """Make the listing (sizes, hashes) and the commit that fit the files as they are now."""
        self.listing = [_describe(name, data) for name, data in sorted(self.files.items())]
        self.commit = hashlib.sha1(json.dumps(self.listing).encode()).hexdigest()


class Hub:
    """The server. `requests` is what it was asked; `stalled` is set while a fault waits for `go`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.stalled = threading.Event()
        self.go = threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, directory: Path, *, gated: bool = False) -> Repo:
        """Serve a directory's files as the repository `name`."""
        repo = Repo({p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}, gated)
        repo.promise()
        self.repos[name] = repo
        return repo

    def asked(self, text: str, method: str = "GET") -> list[Request]:
        """Return the requests whose path contains `text`."""
        return [r for r in self.requests if text in r.path and r.method == method]

    def forget(self) -> None:
        """Forget requests and faults."""
        self.requests.clear()
        self.faults.clear()
        self.stalled.clear()
        self.go.clear()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Use up one turn of the first fault that fits a request."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.path in path:
                fault.times -= 1
                return fault
        return None

    def close(self) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.hub.requests.append(asked)
        fault = self.hub.take_fault(self.command, path)
        if fault is not None and fault.status is not None:
            self._answer(fault.status, b"", fault.headers)
        elif path.startswith("/api/models/"):
            self._serve_info(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._serve_file(path.strip("/"), fault)
        else:
            self._refuse(404, "EntryNotFound")

    def _serve_info(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        repo = self._find(name, revision or "main")
        if repo is not None:
            info = {"id": name, "modelId": name, "sha": repo.commit, "siblings": repo.listing, "tags": []}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _serve_file(self, path: str, fault: Fault | None) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self._find(name, revision)
        if repo is None:
            return
        if repo.gated and self.headers.get("Authorization") != "Bearer hf_accepted":
            self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif file not in repo.files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
        else:
            self._send(repo, file, fault)

    def _send(self, repo: Repo, file: str, fault: Fault | None) -> None:
        data = repo.files[file]
        described = next(d for d in repo.listing if d["rfilename"] == file)
        etag = described["lfs"]["sha256"] if "lfs" in described else described["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        status, asked = 200, self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        self._answer(status, data, {**headers, **(fault.headers if fault else {})}, fault)

    def _find(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            # As the real one: an anonymous client is not told whether a repository exists.
            self._refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        elif revision not in ("main", repo.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.cut_after is None:
            self.wfile.write(data)
            return
        self.wfile.write(data[: fault.cut_after])
        self.wfile.flush()
        self.close_connection = True
        if fault.stall:
            self.hub.stalled.set()
            self.hub.go.wait(60)
        if fault.reset:
            time.sleep(0.2)  # a reset throws away what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _describe(name: str, data: bytes) -> dict[str, Any]:
    """Return a file's entry in the listing: git's hash for small files, LFS's for weights."""
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return entry
