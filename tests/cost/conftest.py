"""What the tests of `moelocal cost` share."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moelocal.chat.command import exit_code
from moelocal.cost import command

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cost as script


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path, monkeypatch):
    """No price table of the user's, no results, and no connection."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(command.results, "default_folder", lambda: tmp_path / "results")

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """The generated log, shorter."""
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    file.write_bytes(b"".join(script.lines(600, 1)))
    return file


@pytest.fixture
def cost() -> Callable[..., int]:
    """The exit code of `moelocal cost` with these arguments."""

    def run(*arguments: object) -> int:
        parser = argparse.ArgumentParser(prog="moelocal cost")
        command.add_flags(parser)
        return exit_code(command.run, parser.parse_args([str(each) for each in arguments]))

    return run
