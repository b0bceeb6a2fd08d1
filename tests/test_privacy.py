"""With the weights on this machine, nothing opens a socket: not loading, not generating, not chatting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelocal import hub
from parity.checkpoints import SMALL, Recipe, write

# Ends the process at the first event of Python's socket module, before anything is sent. Code that opens
# sockets without that module is native; the end of the program looks for the packages that have such code.
GUARD = """
import os, sys
def forbid(event, arguments):
    if event.startswith("socket."):
        os.write(2, f"{event}{arguments}\\n".encode())
        os._exit(99)
sys.addaudithook(forbid)
import moelocal
"""
CHECK = """
found = {"httpx", "requests", "aiohttp", "hf_xet", "huggingface_hub", "grpc"} & set(sys.modules)
assert not found, found
if sys.platform == "linux":
    for fd in filter(os.path.exists, (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))):
        assert not os.readlink(fd).startswith("socket:"), fd
"""


def run(program: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    return subprocess.run(
        [sys.executable, "-c", GUARD + program],
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        env=variables | environment,
    )


def assert_private(program: str, stdin: bytes = b"") -> bytes:
    """The program ran to its end without a socket; gives its output."""
    done = run(program + CHECK, stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights with the embedded model's tokenizer and template: a model from a folder."""
    target = write(
        tmp_path_factory.mktemp("model") / "model", Recipe("qwen3_5_moe", **(SMALL | {"vocab": 4096}))
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(hub.EMBEDDED / name, target / name)
    return target


@pytest.fixture(params=["folder", "embedded"])
def name(request, folder: Path) -> str | None:
    """What `load` is given."""
    return str(folder) if request.param == "folder" else None


def test_load_generate_and_stream_open_no_socket(name):
    program = f"""
model = moelocal.load({name!r})
print(len(moelocal.generate(model, "Hello!", max_tokens=5, seed=1).tokens))
print(sum(len(event.tokens) for event in moelocal.stream(model, "Hello!", max_tokens=3, thinking=False)))
"""
    assert len(assert_private(program).split()) == 2


def test_chat_opens_no_socket(name):
    arguments = ["--max-tokens", "9", "--seed", "1", "--no-thinking", *(["--model", name] if name else [])]
    program = f"""
sys.argv[1:] = {arguments!r}
from moelocal.chat.command import main
assert main() == 0
"""
    assert assert_private(program, b"Hello!\nAnd again?\n/stats\n")


def test_the_guard_sees_a_connection():
    done = run("import socket; socket.create_connection(('127.0.0.1', 9), 1)")
    assert done.returncode == 99
    assert b"socket.__new__" in done.stderr or b"socket.getaddrinfo" in done.stderr


def test_the_guard_sees_a_download(tmp_path):
    # the one thing that may use the network: a name that is not on this machine; ended before it is sent
    done = run("moelocal.load('someone/some-model')", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 99
    assert b"socket." in done.stderr


def test_a_name_with_offline_opens_no_socket(tmp_path):
    program = (
        "from moelocal.errors import ModelNotFound\ntry: moelocal.load('someone/some-model', offline=True)\n"
    )
    done = run(program + "except ModelNotFound as error: print(error)", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert b"someone/some-model: not in the local cache, and offline was asked for" in done.stdout
