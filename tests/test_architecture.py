"""The shape of the source: imports run one way, files stay readable, the public names are listed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import moelocal

PACKAGE = Path(moelocal.__file__).parent

# a module imports only from what stands to its left, or from its own package
ORDER = (
    *(
        "errors",
        "units",
        "flags",
        "whole",
        "machine",
        "config",
        "formats",
        "metal",
        "ops",
        "checkpoint",
        "cache",
        "layers",
        "model",
        "hub",
        "survey",
    ),
    *("text", "quantize", "engine", "evaluate", "doctor", "bench", "pelican", "cost", "chat", "cli"),
)
LAST = ("__init__", "__main__")
"""these gather everything: they may import any module"""


def parts() -> dict[str, list[Path]]:
    """The files of each top-level module or package."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return found


def imported(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from moelocal import chat` imports the module `moelocal.chat`
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used_parts(file: Path) -> set[str]:
    """The top-level parts of moelocal that a file imports."""
    found = {name.split(".")[1] for name in imported(file) if name.startswith("moelocal.")}
    return found & (set(ORDER) | set(parts()))


def test_every_module_has_a_place_in_the_order():
    unknown = set(parts()) - set(ORDER) - set(LAST) - {"embedded"}
    assert not unknown, f"{sorted(unknown)}: give them a place in ORDER, here and in docs/architecture.md"


@pytest.mark.parametrize("part", [p for p in parts() if p in ORDER])
def test_imports_run_one_way(part):
    allowed = set(ORDER[: ORDER.index(part) + 1])
    for file in parts()[part]:
        wrong = used_parts(file) - allowed
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}, which stand to its right"


def test_the_check_sees_a_forbidden_import(tmp_path):
    source = tmp_path / "errors.py"
    source.write_text("def f():\n    from moelocal import cli\n    import moelocal.model as m\n")
    assert used_parts(source) == {"cli", "model"}


@pytest.mark.parametrize("part", ["errors", "units", "flags", "machine", "config", "text"])
def test_configuration_and_text_work_without_mlx(part):
    for file in parts()[part]:
        found = {name for name in imported(file) if name.split(".")[0] == "mlx"}
        assert not found, f"{file.relative_to(PACKAGE)} imports {sorted(found)}"


def test_nothing_in_the_package_imports_tools_tests_or_a_test_only_dependency():
    forbidden = {"tools", "tests", "benchmarks", "torch", "transformers", "mlx_lm", "pytest", "hypothesis"}
    for files in parts().values():
        for file in files:
            found = {name.split(".")[0] for name in imported(file)} & forbidden
            assert not found, f"{file.relative_to(PACKAGE)} imports {sorted(found)}"


def test_one_module_connects_to_other_machines():
    doors = {"socket", "http.client", "urllib.request", "httpx", "requests", "huggingface_hub.get_session"}
    found = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if imported(file) & doors}
    assert found == {"hub/transfer.py", "bench/server.py"}  # the latter refuses all but this machine


def test_dependencies_are_those_that_are_imported(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=; ]", line)[0].replace("-", "_") for line in project["dependencies"]}
    used = {name.split(".")[0] for files in parts().values() for file in files for name in imported(file)}
    extras = {"matplotlib", "resvg_py"}  # where one is missing, one line says how to get it
    assert used - set(sys.stdlib_module_names) - {"moelocal"} - extras == declared


def test_no_module_is_named_after_nothing():
    for file in PACKAGE.rglob("*.py"):
        assert file.stem not in ("utils", "util", "helpers", "common", "misc"), file


def test_long_files_say_why_in_their_docstring():
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        lines = text.count("\n")
        if lines > 400:
            doc = ast.get_docstring(ast.parse(text)) or ""
            assert "One file because" in doc, f"{file.relative_to(PACKAGE)} has {lines} lines and no reason"


def test_every_module_has_a_docstring():
    for file in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file.relative_to(PACKAGE)} says nothing"


def test_public_names_are_listed_sorted():
    assert list(moelocal.__all__) == sorted(moelocal.__all__)
    for name in moelocal.__all__:
        assert hasattr(moelocal, name), f"__all__ promises {name}"
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    bound = {alias.asname or alias.name for node in source.body if isinstance(node, ast.ImportFrom)
             for alias in node.names}  # fmt: skip
    extra = {name for name in bound if not name.startswith("_")} - set(moelocal.__all__) - {"annotations"}
    assert not extra, f"public but not in __all__: {sorted(extra)}"
