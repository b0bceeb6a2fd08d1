"""The answers that pictures are made from, each kept in a file as it comes: a run that ends early goes on later."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from moelocal.errors import RequestError
from moelocal.whole import write_whole

MOST_NBYTES: Final = 4 << 20
"""Of a file with somebody else's answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a prompt, and what it took.

    `source`: "moelocal", "server" or "file"; `origin`: what exactly gave it (weights, address or name of the file);
    `settings`: what else the answer depends on; `tokens_per_second`: of the tokens after the first; `date`: UTC. What
    nobody says is empty or None.
    """

    key: str
    model: str
    source: str
    origin: str
    prompt: str
    text: str
    seed: int | None = None
    quantization: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    reasoning: str = ""
    finish_reason: str = ""
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    machine: str = ""
    date: str = ""


def key(source: str, origin: str, prompt: str, seed: int | None, settings: Mapping[str, Any]) -> str:
    """What an answer depends on, as sixteen hex digits: the same key, the same answer."""
    listed = json.dumps([source, origin, prompt, seed, dict(settings)], sort_keys=True)
    return hashlib.blake2b(listed.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def now() -> str:
    """The time as ISO 8601, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(text: str) -> str:
    """A text that can be written as UTF-8: halves of surrogate pairs, which JSON can hold, are replaced."""
    return text.encode("utf-8", "replace").decode()


def one_line(name: str) -> str:
    """A name that can be printed: no line breaks and tabs, nothing that steers a terminal (? stands for it)."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(plain(name).split()))


class Answers:
    """The answers kept in a folder, by their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, wanted: str) -> Answer | None:
        """The one with this key, or None. Raises `RequestError` for a file that is not one."""
        file = self._file(wanted)
        try:
            found = json.loads(file.read_text("utf-8"))
            if set(found) != {field.name for field in fields(Answer)} or found["key"] != wanted:
                raise ValueError
            return Answer(**found)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, TypeError):
            raise RequestError(
                f"{file}: is no answer of this version; delete it to have it made anew"
            ) from None

    def keep(self, answer: Answer) -> None:
        """Write it down. Raises `RequestError` where that fails."""
        file = self._file(answer.key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{file}: cannot be written: {error.strerror}") from None
        write_whole(file, json.dumps(asdict(answer), ensure_ascii=False, indent=1).encode())

    def _file(self, wanted: str) -> Path:
        return self.folder / f"{wanted}.json"


def read_files(folder: Path, prompt: str) -> list[Answer]:
    """Pictures that other models made, as answers to `prompt`: NAME.svg, NAME-seed7.svg, or any name in a folder NAME;
    also .txt and .md with a whole answer. Raises `RequestError`."""
    if not folder.is_dir():
        raise RequestError(f"--svgs {folder}: expected a folder with .svg files")
    answers = []
    for file in sorted(each for each in folder.rglob("*") if each.suffix.lower() in (".svg", ".txt", ".md")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            with file.open("rb") as stream:
                content = stream.read(MOST_NBYTES + 1)
        except OSError as error:
            raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
        if len(content) > MOST_NBYTES:
            raise RequestError(f"{file}: has more than {MOST_NBYTES:,} bytes; a picture has some thousands")
        name, seed = file.stem, None
        if found := re.fullmatch(r"(.+?)[-_. ]seed[-_ ]?(\d{1,18})", name, re.IGNORECASE):
            name, seed = found[1], int(found[2])
        if file.parent != folder:
            name = file.relative_to(folder).parts[0]
        origin = file.relative_to(folder).as_posix()
        digest = hashlib.blake2b(content).hexdigest()
        answers.append(
            Answer(
                key=key("file", f"{origin} {digest}", prompt, seed, {}),
                model=one_line(name),
                source="file",
                origin=one_line(origin),
                prompt=prompt,
                text=_decoded(content),
                seed=seed,
            )
        )
    if not answers:
        raise RequestError(f"--svgs {folder}: no .svg file in it")
    return answers


def _decoded(content: bytes) -> str:
    """The text of a file: UTF-8, unless it says one of the others that programs write."""
    encoding = "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif re.match(rb"\s*<\?xml[^>]{0,80}encoding=.(iso-8859-1|windows-1252)\b", content, re.IGNORECASE):
        encoding = "windows-1252"  # holds all letters of the other
    return content.decode(encoding, "replace")
