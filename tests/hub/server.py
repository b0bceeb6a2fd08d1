"""A Hugging Face server on loopback, for the real client: repositories from bytes, files or functions, and faults.

    with Server({"owner/name": Repo({"config.json": b"{}", "model.safetensors": Path(...)})}) as server:
        os.environ["HF_ENDPOINT"] = server.url        # before huggingface_hub is imported

It serves what moelocal and huggingface_hub 1 and 2 ask for: /api/models/NAME[/revision/REV], /api/models/NAME/tree/REV,
HEAD and GET of /NAME/resolve/REV/FILE with Range, large files by redirect to another path, as the real one does.
Answers were modelled on those of huggingface.co: the headers X-Repo-Commit, X-Linked-Etag, X-Linked-Size, X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 20


@dataclass(frozen=True)
class Generated:
    """A file made when it is read: `read(offset, length)` gives its bytes. `sha256` None: the server states a checksum
    that is none, and the client checks sizes alone (hashing 72 GB takes longer than the rest of a test)."""

    nbytes: int
    read: Callable[[int, int], bytes]
    sha256: str | None = None


Content = bytes | Path | Generated


@dataclass
class Repo:
    """`files`: name to content. Files named *.safetensors are LFS files, others are in git. `commits`: revisions that
    exist beside the commit itself. `token`: readers must send it; `gated`: and then still may not read."""

    files: Mapping[str, Content]
    commit: str = "c0" * 20
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    gated: bool = False
    store: str = ""  # another server with the large files; this one redirects to it
    etags: dict[str, str] = field(default_factory=dict)

    def size(self, name: str) -> int:
        content = self.files[name]
        if isinstance(content, bytes):
            return len(content)
        return content.stat().st_size if isinstance(content, Path) else content.nbytes

    def read(self, name: str, offset: int, length: int) -> bytes:
        content = self.files[name]
        if isinstance(content, bytes):
            return content[offset : offset + length]
        if isinstance(content, Generated):
            return content.read(offset, length)
        with content.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def is_large(self, name: str) -> bool:
        return name.endswith(".safetensors")

    def etag(self, name: str) -> str:
        """SHA-256 of a large file, git blob id of a small one."""
        if name not in self.etags:
            content = self.files[name]
            if isinstance(content, Generated):
                self.etags[name] = content.sha256 or f"unchecked-{name.replace('.', '-')}"
            else:
                small = hashlib.sha1(b"blob %d\0" % self.size(name))
                digest = hashlib.sha256() if self.is_large(name) else small
                for offset in range(0, self.size(name), CHUNK):
                    digest.update(self.read(name, offset, CHUNK))
                self.etags[name] = digest.hexdigest()
        return self.etags[name]


@dataclass
class Fault:
    """What goes wrong with a request whose path contains `path`, `times` times after `skip` ones that go well.

    status and headers: answer with these. cut: end the connection after this many bytes of the body. resize: announce
    so many bytes more (or fewer) and send as announced. flip: change the byte at this offset of the file. hang: send
    nothing for so many seconds. plain: ignore Range. reset: with `cut`, by RST and not by FIN. shift: send a range that
    begins so many bytes later. unsized: say no length, and end the connection after the last byte. method: only for
    this one.
    """

    path: str
    times: int = 1
    skip: int = 0
    method: str = "GET"
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    resize: int = 0
    flip: int | None = None
    hang: float = 0.0
    plain: bool = False
    reset: bool = False
    shift: int = 0
    unsized: bool = False


@dataclass(frozen=True)
class Request:
    """One request that came: `range` as sent, or None."""

    method: str
    path: str
    range: str | None
    token: str | None
    agent: str | None


class Server:
    """Runs in threads from `with` on. `requests`: what came; `sent`: bytes of bodies of files that were sent;
    `faults`: may be changed at any time; `tokens`: those of its users; `pace`: bytes per second and connection, None
    for as fast as it goes."""

    def __init__(self, repos: Mapping[str, Repo]) -> None:
        self.repos = dict(repos)
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.sent = 0
        self.pace: float | None = None
        self.lock = threading.Lock()
        self.tokens = {"hf_right", "hf_other"}
        self.stopping = threading.Event()
        self._server = _Http(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that strikes this request, used up by it."""
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.method == method and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    def gets(self, path: str = "") -> list[Request]:
        """GET requests for bytes of files whose path contains `path`; redirects count once."""
        with self.lock:
            asked = [r for r in self.requests if r.method == "GET" and "/resolve/" in r.path]
        return [request for request in asked if path in request.path]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        path = unquote(url.path)
        token = self.headers.get("Authorization")
        with hub.lock:
            asked = Request(
                self.command, path, self.headers.get("Range"), token, self.headers.get("User-Agent")
            )
            hub.requests.append(asked)
        fault = hub.fault(self.command, path)
        if fault and fault.hang:
            hub.stopping.wait(fault.hang)
        if fault and fault.status:
            return self.reply(fault.status, b"", dict(fault.headers))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.describe("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), fault)
        elif parts[0] == "cdn":
            repo = hub.repos["/".join(parts[1:3])]
            self.send(repo, "/".join(parts[3:]), fault)
        else:
            self.reply(404, b"", {})

    def open(self, name: str, revision: str, file: str = "") -> Repo | None:
        """The repository, or None after the refusal was sent. What a gated one holds is told, its files are not."""
        repo = self.server.hub.repos.get(name)
        sent = self.headers.get("Authorization")
        if sent and sent.removeprefix("Bearer ") not in self.server.hub.tokens:
            self.reply(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo and repo.gated and file:
            headers = {
                "X-Error-Code": "GatedRepo",
                "X-Error-Message": f"Access to model {name} is restricted.",
            }
            self.reply(403 if sent else 401, b"", headers)
        elif repo is None or (repo.token and sent != f"Bearer {repo.token}"):
            # as huggingface.co: who is not logged in learns nothing
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.reply(404 if sent else 401, b"", headers)
        elif revision not in (repo.commit, *repo.revisions):
            self.reply(
                404,
                b"",
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"},
            )
        else:
            return repo
        return None

    def describe(self, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
        repo = self.open(name, rest[1] if len(rest) > 1 else "main")
        if repo is None:
            return
        if rest and rest[0] == "tree":
            entries = []
            for file in repo.files:
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": file,
                    "size": repo.size(file),
                    "oid": repo.etag(file),
                }
                if repo.is_large(file):
                    entry |= {
                        "oid": "1f" * 20,
                        "lfs": {"oid": repo.etag(file), "size": repo.size(file), "pointerSize": 135},
                    }
                entries.append(entry)
            return self.reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        siblings: list[dict[str, Any]] = []
        for file in repo.files:
            sibling: dict[str, Any] = {"rfilename": file}
            if "blobs" in query:
                sibling |= {"size": repo.size(file), "blobId": repo.etag(file)}
                if repo.is_large(file):
                    lfs = {"sha256": repo.etag(file), "size": repo.size(file), "pointerSize": 135}
                    sibling |= {"blobId": "1f" * 20, "lfs": lfs}
            siblings.append(sibling)
        body = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "private": False,
            "siblings": siblings,
        }
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
        repo = self.open(name, revision, file)
        if repo is None:
            return
        if file not in repo.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        if repo.is_large(file) and fault is None:
            headers = {"X-Linked-Etag": f'"{repo.etag(file)}"', "X-Linked-Size": str(repo.size(file))}
            headers |= {"X-Repo-Commit": repo.commit, "Location": f"{repo.store}/cdn/{name}/{file}"}
            return self.reply(302, b"", headers)
        self.send(repo, file, fault)

    def send(self, repo: Repo, file: str, fault: Fault | None) -> None:
        """The bytes that Range asks for, or all."""
        hub, fault = self.server.hub, fault or Fault("")
        total = repo.size(file) + fault.resize
        first, last, status = 0, total - 1, 200
        headers = {"ETag": f'"{repo.etag(file)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted and not fault.plain:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, status = int(begin) + fault.shift, min(int(end) if end else last, last), 206
            if first >= total:
                return self.reply(416, b"", {"Content-Range": f"bytes */{total}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        headers |= {"Connection": "close"} if fault.unsized else {"Content-Length": str(last + 1 - first)}
        if fault.unsized:
            headers.pop("Content-Range", None)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = last + 1 if fault.cut is None else min(last + 1, first + fault.cut)
        step = CHUNK if hub.pace is None else max(1, int(hub.pace / 50))
        for offset in range(first, end, step):
            if hub.stopping.is_set():
                break
            data = repo.read(file, offset, min(step, end - offset))
            data += bytes(min(step, end - offset) - len(data))
            if fault.flip is not None and offset <= fault.flip < offset + len(data):
                at = fault.flip - offset
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            self.wfile.write(data)
            with hub.lock:
                hub.sent += len(data)
            if hub.pace is not None:
                hub.stopping.wait(len(data) / hub.pace)
        if end < last + 1:
            self.close_connection = True
            if fault.reset:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
