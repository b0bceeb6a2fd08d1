"""Lines of code per package: lines that are neither blank, comment nor docstring. Prints a table."""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def code_lines(file: Path) -> int:
    """Lines of a Python file that hold code."""
    text = file.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for top in ("src/moelocal", "tests", "benchmarks", "tools"):
        for file in sorted((ROOT / top).rglob("*.py")):
            inner = file.relative_to(ROOT / top).parts
            nested = top in ("src/moelocal", "tools") and len(inner) > 1
            name = f"{top}/{inner[0]}" if nested else top
            counts[name] += code_lines(file)
            files[name] += 1
    table = Table("package", "files", "lines of code")
    for name in sorted(counts):
        table.add_row(name, str(files[name]), str(counts[name]))
    source = sum(count for name, count in counts.items() if name.startswith("src/"))
    table.add_row("src in all", "", str(source), style="bold")
    Console().print(table)
    if args.json:
        print(json.dumps({"packages": dict(counts), "source": source}))


if __name__ == "__main__":
    main()
