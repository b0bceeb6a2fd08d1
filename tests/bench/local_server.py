"""A server on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request; the test's functions write the answer."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self.server.asked.append((self.path, None))
        self.server.get(self)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.server.post(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def whole(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        """An answer of known length."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *pieces: bytes, end: bool = True) -> None:
        """Server-sent events, chunked; without `end` the connection is cut."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        if end:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def piece(finish: str | None = None, **delta: Any) -> bytes:
    """An event with a part of an answer."""
    return event({"model": "m1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


DONE = event(b"[DONE]")


def listing(*names: str) -> Answer:
    """The answer to /v1/models."""
    body = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})
    return lambda handler: handler.whole(200, body.encode())


def streaming(*pieces: bytes, end: bool = True) -> Answer:
    return lambda handler: handler.stream(*pieces, end=end)


@contextmanager
def serving(get: Answer, post: Answer) -> Iterator[Any]:
    """The server; `asked` has the requests, `address` where it is."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.get, server.post, server.asked = get, post, list[tuple[str, Any]]()
    server.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer_of(words: Sequence[str], usage: dict[str, Any] | None = None, finish: str = "length") -> Answer:
    """An answer in pieces of text."""
    told = [event({"choices": [], "usage": usage})] if usage else []
    return streaming(*(piece(content=word) for word in words), piece(finish), *told, DONE)
