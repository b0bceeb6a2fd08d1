"""Every script in benchmarks says what it does, refuses what it does not know, and names what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPTS = [file.name for file in FILES if '\nif __name__ == "__main__":\n' in file.read_text()]


def started(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_a_script_does(name):
    done = started(str(ROOT / "benchmarks" / name), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name} [-h]")
    # a sentence between the usage and the list of flags
    description = done.stdout.partition("\n\n")[2].partition("\n\n")[0]
    assert re.match(r"\S.{40,}", description.replace("\n", " ")), done.stdout
    assert "\noptions:\n  -h, --help" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_flag_is_refused(name):
    # behind `--` nothing is a flag: words that every script may need come first
    done = started(str(ROOT / "benchmarks" / name), "--no-such-flag")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"{name}: error: "), done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("budget.py", ("--config", "nothing.json"), "--config: no file nothing.json"),
        ("conversion.py", ("--layers", "41"), "--layers: expected 0 to 40, got 41"),
        ("imports.py", ("no_such_module",), "no module no_such_module here"),
        ("sides.py", ("llama", "x"), "argument program: invalid choice: 'llama' (choose from"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name, arguments, message):
    done = started(str(ROOT / "benchmarks" / name), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"{name}: error: {message}")


def test_a_file_that_is_no_script_belongs_to_one():
    texts = {file.stem: file.read_text() for file in FILES}
    for file in FILES:
        if file.name not in SCRIPTS:
            others = [text for stem, text in texts.items() if stem != file.stem]
            assert any(re.search(rf"^from {file.stem} import ", text, re.MULTILINE) for text in others), file


@pytest.mark.parametrize("name", ["compare_mlx_lm.py", "fidelity.py", "scale.py"])
def test_without_mlx_lm_a_script_says_how_to_get_it(name):
    code = (
        "import runpy, sys; sys.modules['mlx_lm'] = None; sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = started("-c", code, str(ROOT / "benchmarks" / name))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"moelocal: error: mlx-lm is not installed here: {sys.executable} -m pip install 'mlx-lm==0.32.2'\n"
    )


def test_the_version_of_mlx_lm_is_that_of_the_extra():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import sides

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["compare"] == [sides.MLX_LM]
