"""Talking to a server on this machine: what is read from its stream, and what is refused before a socket opens."""

from __future__ import annotations

import json
import socket
import time

import pytest

from bench.local_server import DONE, answer_of, event, listing, piece, serving, streaming
from moelocal.bench.server import Server
from moelocal.errors import RequestError

HELLO = [{"role": "user", "content": "Hello"}]
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def ask(get, post, patience: float = 10, **options):
    with serving(get, post) as server:
        at = Server.at(server.address, patience)
        return at.chat(HELLO, model="m1", max_tokens=9, **options), server.asked


def failing(post, patience: float = 10) -> str:
    """What `chat` says, with the address replaced."""
    with serving(listing("m1"), post) as server:
        with pytest.raises(RequestError) as caught:
            Server.at(server.address, patience).chat(HELLO, model="m1", max_tokens=9)
        return str(caught.value).replace(server.address, "HERE")


def test_an_answer_is_put_together_from_its_pieces():
    post = streaming(
        piece(role="assistant"), piece(reasoning_content="Let me "), piece(reasoning="see."), piece(content="Good "),
        piece(content="day"), piece("stop"), event({"model": "m1", "choices": [], "usage": USAGE}), DONE,
    )  # fmt: skip
    reply, asked = ask(listing("m1"), post, temperature=0.0, seed=7, thinking=False)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Good day", "Let me see.", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (11, 3, 4)
    assert reply.counted and reply.model == "m1"
    assert 0 < reply.first_token_seconds <= reply.last_token_seconds <= reply.seconds
    assert asked == [
        ("/v1/models", None),
        (
            "/v1/chat/completions",
            {
                "model": "m1",
                "messages": HELLO,
                "max_tokens": 9,
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 0.0,
                "seed": 7,
                "chat_template_kwargs": {"enable_thinking": False},
                "reasoning_effort": "none",
            },
        ),
    ]


def test_what_is_not_asked_for_is_not_sent():
    _, asked = ask(listing("m1"), answer_of(["x"]), thinking=True)
    assert set(asked[1][1]) == {
        "model",
        "messages",
        "max_tokens",
        "stream",
        "stream_options",
        "chat_template_kwargs",
    }


def test_a_server_that_counts_nothing_is_not_believed_to_have_counted():
    reply, _ = ask(listing("m1"), answer_of(["one", " two", " three"]))
    assert (reply.counted, reply.prompt_tokens, reply.completion_tokens) == (False, 0, 3)
    assert reply.cached_tokens is None


@pytest.mark.parametrize(
    "usage", [{"completion_tokens": -1}, {"completion_tokens": "3"}, {"completion_tokens": True}]
)
def test_a_count_that_is_none_is_no_count(usage):
    reply, _ = ask(listing("m1"), answer_of(["one", " two"], usage))
    assert (reply.counted, reply.completion_tokens) == (False, 2)


def test_the_time_to_the_first_token_is_that_of_the_first_text():
    def post(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for data in (piece(role="assistant"), piece(content="a"), piece(content="b"), piece("length"), DONE):
            handler.wfile.write(data)
            handler.wfile.flush()
            time.sleep(0.05)
        handler.close_connection = True

    reply, _ = ask(listing("m1"), post)
    assert reply.text == "ab"
    # written 0.05, 0.10 and 0.20 seconds after the first event; sleeping is never shorter
    assert 0.05 <= reply.first_token_seconds < reply.last_token_seconds < reply.seconds
    assert (
        reply.last_token_seconds - reply.first_token_seconds >= 0.04
    )  # what the first event took to arrive is allowed
    assert reply.seconds - reply.last_token_seconds >= 0.04


def test_every_form_of_server_sent_events_is_read():
    body = json.dumps({"choices": [{"delta": {"content": "ab"}}]})
    a, b = body[:11], body[11:]  # a line may end where JSON has a space
    post = streaming(
        b": keep-alive\r\n\r\n", f"event: message\r\ndata:{a}\r\ndata:{b}\r\n\r\n".encode(), piece(content="é"),
        'data: {"choices": [{"delta": {"content": "ü"}}]}\n'.encode(), b"\n", piece("stop"), b"data: [DONE]\n\n",
    )  # fmt: skip
    reply, _ = ask(listing("m1"), post)
    assert reply.text == "abéü"


def test_a_stream_whose_last_event_has_no_empty_line_behind_it_is_whole():
    reply, _ = ask(listing("m1"), streaming(piece(content="a"), piece("stop"), b"data: [DONE]"))
    assert reply.text == "a"


def test_an_answer_without_done_is_whole_if_it_says_why_it_ended():
    reply, _ = ask(listing("m1"), streaming(piece(content="a"), piece("stop")))
    assert (reply.text, reply.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("end", [True, False])
def test_a_cut_answer_is_an_error(end):
    assert failing(streaming(piece(content="a"), end=end)) == (
        "server HERE: the connection was cut while it answered (no end of the stream)"
    )


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            404,
            b'{"error": {"message": "model m1 not found", "code": 7}}',
            "404 Not Found: model m1 not found",
        ),
        (400, b'{"error": "too\\nlong"}', "400 Bad Request: too long"),
        (422, b'{"detail": [{"loc": ["body"]}]}', '422 Unprocessable Entity: [{"loc": ["body"]}]'),
        (500, b"<html>oops</html>", "500 Internal Server Error: <html>oops</html>"),
        (503, b"", "503 Service Unavailable"),
    ],
)
def test_what_the_server_says_of_a_failure_is_told(status, body, words):
    found = failing(lambda handler: handler.whole(status, body))
    if status == 422:
        found = found.replace("Unprocessable Content", "Unprocessable Entity")  # as Python 3.13 names it
    assert found == f"server HERE: /v1/chat/completions: {words}"


def test_a_redirect_is_not_followed():
    post = lambda handler: handler.whole(307, b"", Location="http://198.51.100.1/v1")  # noqa: E731
    assert failing(post) == "server HERE: /v1/chat/completions: 307 Temporary Redirect"


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([event({"error": {"message": "out of memory"}})], "it failed while it answered: out of memory"),
        ([event(b"{nonsense")], "expected JSON, got {nonsense"),
        ([event([1])], "an event of its stream is no object: [1]"),
        ([piece(content=5)], 'a piece of its answer is no text: {"content": 5}'),
    ],
)
def test_a_stream_that_is_none_is_an_error(pieces, words):
    assert failing(streaming(*pieces, DONE)) == f"server HERE: {words}"


def test_an_answer_that_is_no_stream_is_an_error():
    assert failing(lambda handler: handler.whole(200, b'{"choices": []}')) == (
        "server HERE: it was asked for a stream (text/event-stream) and sent application/json"
    )


def test_a_server_that_falls_silent_is_not_waited_for_forever():
    def post(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(piece(content="a"))
        handler.wfile.flush()
        time.sleep(1)

    assert failing(post, patience=0.2) == "server HERE: it sent nothing for 0 seconds"


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://198.51.100.1:9")
    reply, _ = ask(listing("m1"), answer_of(["a"]))
    assert reply.text == "a"


def test_the_only_model_is_taken():
    with serving(listing("m1"), answer_of(["a"])) as server:
        assert Server.at(server.address).chat(HELLO, model=None, max_tokens=1).text == "a"
        assert server.asked[-1][1]["model"] == "m1"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "b"), "it serves 2 models; name one, as HERE=a: a, b"),
        ((), "it serves no model; load one there"),
    ],
)
def test_of_several_models_one_must_be_named(names, words):
    with serving(listing(*names), answer_of(["a"])) as server, pytest.raises(RequestError) as caught:
        Server.at(server.address).chat(HELLO, model=None, max_tokens=1)
    assert str(caught.value).replace(server.address, "HERE") == f"server HERE: {words}"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_address_may_have_v1_behind_it(suffix):
    with serving(listing("m1", "m2"), answer_of([])) as server:
        port = server.address.split(":")[1]
        assert Server.at(f"http://localhost:{port}{suffix}").models() == ["m1", "m2"]
        assert {path for path, _ in server.asked} == {"/v1/models"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"models": []}', "/v1/models is not the list of an OpenAI-compatible server"),
        (b'{"data": ["m"]}', "/v1/models is not the list of an OpenAI-compatible server"),
        (b"<html>", "expected JSON, got <html>"),
        (b"", "expected JSON, got nothing"),
        (b"\xff\xfe\xfd", "expected JSON, got ���"),
    ],
)
def test_what_is_no_such_server_is_refused(body, words):
    get = lambda handler: handler.whole(200, body)  # noqa: E731
    with serving(get, answer_of([])) as server, pytest.raises(RequestError) as caught:
        Server.at(server.address)
    assert str(caught.value) == f"server {server.address}: {words}"


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RequestError) as caught:
        Server.at(address)
    assert str(caught.value) == (
        f"server {address}: nobody answers (connection refused); start the server there, or name another address"
    )


ELSEWHERE = "{} is not this machine (localhost, 127.0.0.1, ::1), and prompts stay on it"
REFUSED = {
    "example.com:80": ELSEWHERE.format("example.com"),
    "http://192.168.1.7:1234/v1": ELSEWHERE.format("192.168.1.7"),
    "0.0.0.0:1234": ELSEWHERE.format("0.0.0.0"),
    "localhost.example.com:1": ELSEWHERE.format("localhost.example.com"),
    "2130706433:80": ELSEWHERE.format("2130706433"),
    "": ELSEWHERE.format("no host"),
    "http://127.0.0.1@example.com:1": "holds more than a host, a port and a path",
    "http://localhost:1/v1?key=7": "holds more than a host, a port and a path",
    "https://localhost:1": "speaks https, only http is spoken here",
    "ftp://localhost:1": "speaks ftp, only http is spoken here",
    "localhost": "has no port",
    "localhost:0": "has no port",
    "localhost:99999": "Port out of range 0-65535",
    "http://[::1:80": "Invalid IPv6 URL",
}


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_elsewhere_is_refused_before_a_socket_opens(address, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", opened)
    monkeypatch.setattr(socket, "getaddrinfo", opened)
    with pytest.raises(RequestError) as caught:
        Server.at(address)
    assert (
        str(caught.value) == f"server {address}: {REFUSED[address]}; expected an address like localhost:1234"
    )


def test_localhost_is_never_looked_up(monkeypatch):
    with serving(listing("m1"), answer_of([])) as server:
        asked, real = [], socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *rest: asked.append(host) or real(host, *rest)
        )
        Server.at(f"localhost:{server.address.split(':')[1]}")
    assert asked == ["127.0.0.1"]
