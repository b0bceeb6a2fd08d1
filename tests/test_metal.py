"""The text of a kernel as compilers get it: includes, line numbers, comments. Nothing is compiled here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelocal import metal

FILES = sorted(metal.FOLDER.glob("*.metal"))


def placed(text: str) -> Iterator[tuple[str, int, str]]:
    """File, number and content of each line, as the `#line` directives say."""
    file, number = "", 0
    for line in text.splitlines():
        directive = re.fullmatch(r'#line (\d+) "(\w+)\.metal"', line)
        if directive:
            file, number = directive[2], int(directive[1])
        else:
            yield file, number, line
            number += 1


def expected(folder: Path, name: str) -> list[tuple[str, int, str]]:
    """Each line of a file but its includes, without its comment if it is nothing else."""
    lines = enumerate((folder / f"{name}.metal").read_text("ascii").splitlines(), start=1)
    return [
        (name, number, "" if line.strip().startswith("//") else line)
        for number, line in lines
        if not line.startswith("#include")
    ]


def test_an_include_is_expanded_once_however_often_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = {
        "top": '// Head.\n#include "left.metal"\n#include "right.metal"\n\n#include "base.metal"\nint top;  // stays\n',
        "left": '#include "base.metal"\nint left;\n',
        "right": '// Head.\n  // Indented.\n#include "base.metal"\nint right;\n#include "right.metal"',
        "base": "int base;\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.metal").write_text(text)
    monkeypatch.setattr(metal, "FOLDER", tmp_path)
    got = metal.text.__wrapped__("top")  # nothing of it is remembered
    assert "#include" not in got and got.endswith("\n")
    assert list(placed(got)) == [
        ("top", 1, ""),
        ("base", 1, "int base;"),
        ("left", 2, "int left;"),
        ("right", 1, ""),
        ("right", 2, ""),
        ("right", 4, "int right;"),
        ("top", 4, ""),
        ("top", 6, "int top;  // stays"),
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_of_a_kernel_has_its_place(path: Path):
    """Compilers report the file and the line that a reader finds, and each file stands in the text once."""
    got = metal.text(path.stem)
    assert "#include" not in got
    found = list(placed(got))
    files = list(dict.fromkeys(file for file, _, _ in found))
    for file in files:
        assert [place for place in found if place[0] == file] == expected(metal.FOLDER, file)
    included = set(re.findall(r'^#include "(\w+)\.metal"$', path.read_text("ascii"), re.MULTILINE))
    assert included < set(files) and path.stem in files


def test_kernels_are_ascii():
    assert FILES
    assert [path.name for path in FILES if not path.read_bytes().isascii()] == []
