"""The README is true: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from moelocal import hub
from moelocal.errors import MoelocalError


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_python_examples_run_one_after_the_other(readme, capsys):
    examples = blocks(readme, "python")
    assert len(examples) >= 6
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "tokens" in printed and "no/such/folder" in printed
    assert names["done"].tokens


def test_two_commands_set_everything_up_by_themselves(readme):
    # .ci/run takes them from here and runs them as they are
    setup = [block.strip() for block in blocks(readme, "sh") if block.startswith("python3 -m venv")]
    assert len(setup) == 2
    assert setup[0].endswith("python -m moelocal.chat") and setup[1].endswith("pytest")
    assert all(command.count("\n") == 0 for command in setup)


def test_the_other_commands_parse(readme, root, capsys):
    from moelocal.cli import main

    lines = [
        line
        for block in blocks(readme, "sh")
        for line in block.splitlines()
        if not line.startswith("python3")
    ]
    assert len(lines) >= 4
    for line in lines:
        command = re.split(r"[|>]", line)[1 if line.startswith("echo") else 0]
        words = shlex.split(command, comments=True)
        program, arguments = Path(words[0]).name, words[1:]
        if program == "pip":
            (extra,) = re.findall(r"\[(\w+)\]", line)
            assert (
                extra
                in tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            )
            continue
        if program == "python":
            assert arguments[:2] == ["-m", "moelocal.chat"]
            arguments = ["chat", *arguments[2:]]
        else:
            assert program == "moelocal"
        # --help behind the arguments: everything before it is parsed, nothing runs
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--help"])
        assert left.value.code == 0, line
        assert "usage:" in capsys.readouterr().out


def test_links_lead_to_files(readme, root):
    for page in [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_error_in_the_example_is_ours():
    with pytest.raises(MoelocalError, match="no/such/folder"):
        hub.resolve("no/such/folder")
