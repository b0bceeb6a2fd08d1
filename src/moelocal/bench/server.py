"""`Server`: an OpenAI-compatible server of another program on this machine: LM Studio, Ollama, llama.cpp, mlx-lm.

Nothing leaves the machine. An address is a number that stands for this machine (127.0.0.0/8, ::1) or the name
`localhost`, which is not looked up; proxies and redirects are not followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Final
from urllib.parse import urlsplit

from moelocal.errors import RequestError

CONNECT_SECONDS: Final = 5.0
"""To open a connection on this machine."""

PATIENCE_SECONDS: Final = 3600.0
"""Between two pieces of an answer: the first comes when the whole prompt is read, which takes long."""

_MOST_BYTES: Final = 1 << 24
"""Of a line of a stream, and of an answer that is no stream."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of a server.

    `reasoning`: the thinking part, where the server parts it. `counted`: whether the server counted the tokens; if not,
    `prompt_tokens` is 0 and `completion_tokens` the number of pieces in which the text came (for most servers a token
    each), which is no count. `first_token_seconds`: from the request to the first piece of text (thinking included);
    `last_token_seconds`: to the last one; `seconds`: to the end, and so are all three where there is no text.
    `finish_reason`: "stop", "length", …, or empty. `model`: as the server names it. `cached_tokens`: of the prompt,
    those that the server says it did not read again; None where it does not say.
    """

    text: str
    reasoning: str
    prompt_tokens: int
    completion_tokens: int
    counted: bool
    first_token_seconds: float
    seconds: float
    finish_reason: str
    model: str
    last_token_seconds: float
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. `address`: as it was named; `hosts`, `port`, `base`: where requests go, "/v1" included."""

    address: str
    hosts: tuple[str, ...]
    port: int
    base: str
    patience: float = PATIENCE_SECONDS

    @classmethod
    def at(cls, address: str, patience: float = PATIENCE_SECONDS) -> Server:
        """The server at "localhost:1234" or "http://127.0.0.1:11434", with or without "/v1". `patience`: seconds to
        wait for the next piece of an answer.

        Raises `RequestError` for an address that is not on this machine (no connection is opened then), if nobody
        answers there, or something that is no such server.
        """
        server = cls(address, *_parsed(address), patience)
        server.models()
        return server

    @classmethod
    def named(cls, words: str) -> tuple[Server, str]:
        """The server of "ADDRESS=MODEL" and that model, of "ADDRESS" the only one there. Raises `RequestError` as `at`
        and `only_model`; whether a named model is there, only an answer tells: not every server lists all it has."""
        address, _, model = words.partition("=")
        server = cls.at(address)
        return server, model or server.only_model()

    def models(self) -> list[str]:
        """The names of the models that it serves, in its order. Raises `RequestError`."""
        with self._answer("GET", "/models") as response:
            found = self._json(self._body(response))
        listed = found.get("data") if isinstance(found, dict) else None
        if not isinstance(listed, list) or not all(isinstance(m, dict) and "id" in m for m in listed):
            raise self._error(f"{self.base}/models is not the list of an OpenAI-compatible server")
        return [str(model["id"]) for model in listed]

    def only_model(self) -> str:
        """The model, where there is one. Raises `RequestError` with the names of all, if there are several."""
        names = self.models()
        if len(names) == 1:
            return names[0]
        if not names:
            raise self._error("it serves no model; load one there")
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise self._error(f"it serves {len(names)} models; name one, as {self.address}={names[0]}: {shown}")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None,
        max_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        thinking: bool | None = None,
    ) -> Reply:
        """The answer to a conversation. `model` None: the only one. What is None is left to the server. `thinking` is
        asked for in the two ways that are common; some servers know neither.

        Raises `RequestError`, which names the address and what went wrong.
        """
        name = self.only_model() if model is None else model
        body: dict[str, Any] = {"model": name, "messages": list(messages), "max_tokens": max_tokens}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {k: v for k, v in (("temperature", temperature), ("seed", seed)) if v is not None}
        if thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": thinking}  # llama.cpp, mlx-lm, oMLX, vLLM
        if thinking is False:
            body["reasoning_effort"] = "none"  # Ollama, llama.cpp
        begin = time.perf_counter()
        with self._answer("POST", "/chat/completions", json.dumps(body).encode()) as response:
            kind = response.headers.get_content_type()
            if kind != "text/event-stream":
                raise self._error(f"it was asked for a stream (text/event-stream) and sent {kind}")
            return self._collected(self._events(response), begin, name)

    def _collected(self, events: Iterator[Any], begin: float, name: str) -> Reply:
        text, reasoning, usage, finish, first, last, pieces = [], [], None, "", 0.0, 0.0, 0
        for event in events:
            if not isinstance(event, dict):
                raise self._error(f"an event of its stream is no object: {_short(event)}")
            if event.get("error"):
                raise self._error(f"it failed while it answered: {_message(event)}")
            name = str(event.get("model") or name)
            usage = event.get("usage") or usage
            choices = event.get("choices") or [{}]
            choice = choices[0] if isinstance(choices, list) and isinstance(choices[0], dict) else {}
            finish = str(choice.get("finish_reason") or finish)
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                continue
            said = delta.get("content") or ""
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            if not isinstance(said, str) or not isinstance(thought, str):
                raise self._error(f"a piece of its answer is no text: {_short(delta)}")
            if said or thought:
                pieces += 1
                last = time.perf_counter() - begin
                first = first or last
                text.append(said)
                reasoning.append(thought)
        seconds = time.perf_counter() - begin
        prompt, completion, cached = _usage(usage)
        counted = completion is not None
        return Reply(
            text="".join(text),
            reasoning="".join(reasoning),
            prompt_tokens=prompt or 0,
            completion_tokens=pieces if completion is None else completion,
            counted=counted,
            first_token_seconds=first or seconds,
            seconds=seconds,
            finish_reason=finish,
            model=name,
            last_token_seconds=last or seconds,
            cached_tokens=cached,
        )

    def _events(self, response: HTTPResponse) -> Iterator[Any]:
        """The JSON of each server-sent event (WHATWG HTML 9.2) up to "[DONE]" or the end."""
        data: list[str] = []
        finished = False
        while True:
            try:
                raw = response.readline(_MOST_BYTES)
            except TimeoutError:
                raise self._error(f"it sent nothing for {self.patience:.0f} seconds") from None
            except (OSError, HTTPException, ValueError) as error:
                raise self._error(f"the connection was cut while it answered ({_cause(error)})") from None
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            if data and (not raw or not line):
                whole = "\n".join(data)
                data.clear()
                if whole.strip() == "[DONE]":
                    return
                event = self._json(whole.encode())
                choices = event.get("choices") if isinstance(event, dict) else None
                if isinstance(choices, list) and choices and isinstance(choices[0], dict):
                    finished = finished or bool(choices[0].get("finish_reason"))
                yield event
            if not raw:
                if finished:
                    return
                raise self._error("the connection was cut while it answered (no end of the stream)")

    def _connection(self) -> HTTPConnection:
        """A connection to the first of the hosts that takes one."""
        cause = ""
        for host in self.hosts:
            connection = HTTPConnection(host, self.port, timeout=CONNECT_SECONDS)
            try:
                connection.connect()
            except OSError as error:
                cause = cause or _cause(error)
                continue
            assert connection.sock is not None
            connection.sock.settimeout(self.patience)
            return connection
        raise self._error(f"nobody answers ({cause}); start the server there, or name another address")

    @contextmanager
    def _answer(self, method: str, path: str, body: bytes | None = None) -> Iterator[HTTPResponse]:
        """The answer to a request, if it is one of success."""
        with (
            closing(self._connection()) as connection,
            closing(self._ask(connection, method, path, body)) as found,
        ):
            if found.status != 200:
                told = self._body(found)
                try:
                    words = _message(json.loads(told))
                except ValueError:
                    words = _short(told.decode("utf-8", "replace"))
                reason = http.client.responses.get(found.status, "")
                raise self._error(f"{self.base}{path}: {found.status} {reason}: {words}".rstrip(": "))
            yield found

    def _ask(self, connection: HTTPConnection, method: str, path: str, body: bytes | None) -> HTTPResponse:
        headers = {"Accept": "text/event-stream" if body else "application/json", "User-Agent": "moelocal"}
        headers |= {"Content-Type": "application/json"} if body else {}
        try:
            connection.request(method, f"{self.base}{path}", body, headers)
            return connection.getresponse()
        except TimeoutError:
            raise self._error(f"it sent nothing for {self.patience:.0f} seconds") from None
        except (OSError, HTTPException) as error:
            raise self._error(f"it does not speak HTTP, or hung up ({_cause(error)})") from None

    def _body(self, response: HTTPResponse) -> bytes:
        try:
            return response.read(_MOST_BYTES)
        except (OSError, HTTPException) as error:
            raise self._error(f"the connection was cut while it answered ({_cause(error)})") from None

    def _json(self, told: bytes) -> Any:
        try:
            return json.loads(told)
        except ValueError:  # what is no JSON, or no UTF-8
            raise self._error(
                f"expected JSON, got {_short(told.decode('utf-8', 'replace')) or 'nothing'}"
            ) from None

    def _error(self, what: str) -> RequestError:
        return RequestError(f"server {self.address}: {printable(what)}")


def _parsed(address: str) -> tuple[tuple[str, ...], int, str]:
    """Hosts, port and base path. Raises `RequestError`."""

    def refused(why: str) -> RequestError:
        return RequestError(f"server {address}: {why}; expected an address like localhost:1234")

    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise refused(str(error)) from None
    if parts.scheme != "http":
        raise refused(f"speaks {parts.scheme}, only http is spoken here")
    if parts.query or parts.fragment or parts.username is not None:
        raise refused("holds more than a host, a port and a path")
    hosts: tuple[str, ...] = (
        "127.0.0.1",
        "::1",
    )  # a name could be looked up elsewhere; servers bind to either
    if host != "localhost":
        try:
            if not ipaddress.ip_address(host).is_loopback:
                raise ValueError
        except ValueError:
            raise refused(
                f"{host or 'no host'} is not this machine (localhost, 127.0.0.1, ::1), and prompts stay on it"
            ) from None
        hosts = (host,)
    if not port:
        raise refused("has no port")
    base = parts.path.rstrip("/")
    return hosts, port, base if base.endswith("/v1") else f"{base}/v1"


def _usage(usage: Any) -> tuple[int | None, int | None, int | None]:
    """Tokens of the prompt, of the answer, and of the prompt those that were cached; None for what is not told."""
    if not isinstance(usage, dict):
        return None, None, None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    found = [usage.get("prompt_tokens"), usage.get("completion_tokens"), cached]
    prompt, completion, cached = [
        value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
        for value in found
    ]
    return prompt, completion, cached


def _message(told: Any) -> str:
    """What an error object says: {"error": {"message": …}}, {"error": …}, {"message": …} or {"detail": …}."""
    if isinstance(told, dict):
        for key in ("error", "message", "detail"):
            if told.get(key):
                return _message(told[key])
    return _short(told)


def printable(text: str) -> str:
    """What a server says, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _short(value: Any) -> str:
    words = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return words if len(words) <= 200 else words[:200] + "…"


def _cause(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
