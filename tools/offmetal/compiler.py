"""Compiles one specialisation of a kernel to a shared object, cached on disk by its text."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from offmetal import lint, toolchain
from offmetal.places import Place, places
from offmetal.rewrite import fix_conditional, rewrite
from offmetal.signature import Signature


class MetalCompileError(RuntimeError):
    """The kernel does not compile as Metal."""


_ROUNDS: Final = 8
"""Each round repairs all conditionals that clang named; a template may show the next ones only then."""


class _Text:
    """The header or the source of a kernel, as its author wrote it and as clang gets it."""

    def __init__(self, text: str, name: str) -> None:
        self.name, self.original, self.rewritten = name, text, rewrite(text)
        self._lines = {place: index for index, place in enumerate(places(text, name))}

    def index(self, place: Place) -> int | None:
        """The line of the text, from 0, that clang calls `place`."""
        return self._lines.get(place)

    def repair(self, place: Place, column: int) -> bool:
        """Whether the conditional operator there could be rewritten."""
        index = self.index(place)
        text = None if index is None else fix_conditional(self.rewritten, index + 1, column)
        if text is None:
            return False
        self.rewritten = text
        return True


def compile_kernel(signature: Signature, *, checked: bool, fused: bool, linted: bool) -> Path:
    """The shared object. Raises `MetalCompileError`; `linted` (checked mode only) also for what clang accepts and Metal
    does not."""
    header = _Text(signature.header, f"{signature.name}.header")
    source = _Text(signature.source, f"{signature.name}.source")
    linted = linted and checked
    key = repr((signature.name, header.original, source.original, signature.head, signature.entry))
    digest = hashlib.sha256((key + repr((checked, fused, linted))).encode()).hexdigest()[:24]
    target = toolchain.folder() / digest[:2] / f"{digest}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=toolchain.folder(), prefix=".") as workshop:
        whole = Path(workshop) / "kernel.metal"
        for _ in range(_ROUNDS):
            whole.write_text(
                f'#line 1 "{header.name}"\n{header.rewritten}\n'
                f'#line 1 "{signature.name}.signature"\n{signature.head}'
                f'#line 1 "{source.name}"\n{source.rewritten}\n}}\n'
                f'#line 1 "{signature.name}.entry"\n{signature.entry}'
            )
            library, errors, tree = _clang(whole, checked, fused, linted)
            if not errors:
                texts = (header.original, header.name, source.original, source.name)
                findings = lint.check(tree, *texts) if linted else []
                if findings:
                    lines = [f"{file}:{line}: error: {text}" for file, line, text in findings]
                    raise MetalCompileError("\n".join([f"kernel {signature.name}:", *lines]))
                target.parent.mkdir(exist_ok=True)
                library.replace(target)
                return target
            if not _repair(errors, [header, source]):
                break
    raise MetalCompileError(f"kernel {signature.name}:\n{_readable(errors, [header, source])}")


def _clang(whole: Path, checked: bool, fused: bool, dumped: bool) -> tuple[Path, str, str]:
    """The library, errors ("" if it compiled) and, made at the same time, the syntax tree."""
    command = toolchain.compiler(checked, fused)
    command += ["-include-pch", str(toolchain.prelude(checked, fused))]
    library = whole.with_suffix(".so")
    dump = ["-fsyntax-only", "-w", "-Xclang", "-ast-dump", "-fno-color-diagnostics", str(whole)]
    link = ["-shared", "-nostdlib", str(whole), "-o", str(library)]
    link += ["-x", "none", str(toolchain.runtime()), "-lm"]
    if not dumped:
        done = toolchain.run([*command, *link])
        return library, _errors(done), ""
    with subprocess.Popen(
        [*command, *dump], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as dumper:
        done = toolchain.run([*command, *link])
        tree = dumper.communicate()[0]
    return library, _errors(done), tree


def _errors(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr or f"clang ended with {done.returncode}") if done.returncode else ""


def _repair(errors: str, texts: list[_Text]) -> bool:
    """Rewrite the conditionals that clang, but not Metal, rejects. Whether another round is worth while."""
    found = re.findall(r"(?m)^(.*?):(\d+):(\d+): error: incompatible operand types", errors)
    again = False
    # from the end of a file, so that columns before it still hold
    for file, line, column in sorted(
        {(file, int(line), int(column)) for file, line, column in found}, reverse=True
    ):
        if any(text.repair((file, line), column) for text in texts):
            again = True
        elif file.startswith(str(toolchain.headers())):  # our copy of an MLX header
            with toolchain.locked():
                before = Path(file).read_text()
                after = fix_conditional(before, line, column)
                if after is not None:
                    toolchain.publish_text(Path(file), after)
                again = True  # without a change of ours another process made it
    return again


def _readable(errors: str, texts: list[_Text]) -> str:
    """clang's messages, with the author's lines in place of the rewritten ones, and without notes on the library."""
    out: list[str] = []
    file, replaced, left_out = "", False, False
    for line in errors.splitlines():
        if line.startswith("In file included from"):
            continue
        message = re.match(r"(.*?):\d+:\d+: (fatal error|error|warning|note)", line)
        if message:
            file, replaced = message[1], False
            left_out = message[2] == "note" and file.startswith(str(toolchain.headers()))
        if left_out:
            continue
        quote = re.match(r" *(\d+) \| ", line)
        if quote:
            for text in texts:
                index = text.index((file, int(quote[1])))
                if index is not None:
                    original = text.original.split("\n")[index]
                    replaced = original != text.rewritten.split("\n")[index]
                    if replaced:
                        line = f"{quote[0]}{original}"
        elif replaced and re.match(r" *\| ", line):
            continue  # the markers below a rewritten line point at other columns
        out.append(line)
    return "\n".join(out)
