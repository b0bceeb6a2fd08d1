"""The texts that calibration and evaluation read, as token ids. Two sides that share no paragraph and no chat.

Built in: Python's own documentation (`pydoc_data.topics`, present in every Python; PSF licence; not copied), and the
chats of `chats.jsonl`, made by the generators of the embedded model's training data (`tools/embedded/chats.py`;
Apache-2.0), written with the checkpoint's own chat template. Or a file of the user's.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Literal

from moelocal.errors import RequestError, TemplateError, TokenizerError
from moelocal.text.messages import prepare, prepare_tools
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer

Side = Literal["calibration", "evaluation"]
SIDES: Final[tuple[Side, Side]] = ("calibration", "evaluation")

_KINDS: Final = ("documentation", "chats")
_CHARACTERS: Final = 8
"""Of a text that are encoded for each token that is wanted; prose has 4 to 5 a token."""
_CHATS: Final = Path(__file__).parent / "chats.jsonl"


@dataclass(frozen=True)
class Corpus:
    """`sequences` of token ids, each a text of its own, the kind of each ("documentation", "chats", "text"), and where
    they come from in words."""

    name: str
    sequences: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over lengths and ids: equal digests, equal evaluations."""
        found = hashlib.sha256()
        for ids in self.sequences:
            found.update(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))
        return found.hexdigest()

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return sum(map(len, self.sequences))

    @classmethod
    def built_in(cls, folder: Path, side: Side, tokens: int, length: int) -> Corpus:
        """About `tokens` tokens of one side in sequences of at most `length`, by turns documentation and chats, as long
        as there are both. `folder` has the tokenizer and perhaps the template.

        Raises `TokenizerError`, `TemplateError`; `RequestError` for impossible sizes.
        """
        _check(tokens, length)
        tokenizer = Tokenizer.open(folder)
        write = _writer(folder)
        docs = _cut((tokenizer.encode(text) for text in documentation(side)), length)
        talks = _pack((tokenizer.encode(write(chat)) for chat in chats(side)), length)
        pairs = zip_longest(docs, talks, fillvalue=())
        mixed = ((kind, ids) for pair in pairs for kind, ids in zip(_KINDS, pair, strict=True))
        return cls._of(f"built-in {side} text", mixed, tokens)

    @classmethod
    def _of(cls, name: str, parts: Iterable[tuple[str, tuple[int, ...]]], tokens: int) -> Corpus:
        """The first `tokens` tokens. A sequence of one token has nothing to predict and is left out."""
        taken: list[tuple[str, tuple[int, ...]]] = []
        for kind, ids in parts:
            if len(ids) > 1:
                taken.append((kind, ids[:tokens]))
                tokens -= len(ids)
            if tokens < 2:
                break
        return cls(name, tuple(ids for _, ids in taken), tuple(kind for kind, _ in taken))

    @classmethod
    def from_file(cls, file: Path, folder: Path, tokens: int, length: int) -> Corpus:
        """The first `tokens` tokens of a file in sequences of at most `length`: plain text, cut where a sequence is
        full; or, named .jsonl, one object a line with a "text" or with "messages" (and "tools"), kept whole where they
        fit. Raises `RequestError` for a file that cannot be used, `TokenizerError`, `TemplateError`."""
        _check(tokens, length)
        tokenizer = Tokenizer.open(folder)
        text = _read(file)
        if file.suffix == ".jsonl":
            parts = _pack(_lines(file, text, folder, tokenizer), length)
        else:
            parts = _cut(iter([_beginning(tokenizer, text, tokens)]), length)
        corpus = cls._of(file.name, (("text", ids) for ids in parts), tokens)
        if not corpus.sequences:
            raise RequestError(f"{file}: expected a text of at least 2 tokens, got fewer")
        return corpus


def documentation(side: Side) -> list[str]:
    """Python's documentation topics of one side, in the order of their hashes. A paragraph that stands in several
    topics belongs to the first of them in the order of names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RequestError(
            "this Python has no pydoc_data.topics, the built-in text; give a text of your own"
        ) from None
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics):
        paragraphs = {p.strip(): p for p in topics[name].split("\n\n") if p.strip()}
        new = [p for key, p in paragraphs.items() if key not in seen]
        seen |= paragraphs.keys()
        if new:
            kept[name] = "\n\n".join(new) + "\n\n"
    return [kept[name] for name in sorted(kept, key=_hash) if _side(name) == side]


def chats(side: Side) -> list[dict[str, Any]]:
    """The built-in chats of one side: objects with "messages", some with "tools". Those that begin alike are on one
    side."""
    lines = map(json.loads, _CHATS.read_text(encoding="utf-8").splitlines())
    return [chat for chat in lines if _side(chat["messages"][0]["content"]) == side]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _side(name: str) -> Side:
    return SIDES[_hash(name)[0] % 2]


def _writer(folder: Path) -> _Writer:
    """With the folder's template if it has one. Raises `TemplateError` for one that is damaged."""
    config = folder / "tokenizer_config.json"
    there = any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if there or (config.is_file() and b'"chat_template"' in config.read_bytes()):
        return _Writer(ChatTemplate.open(folder))
    return _Writer(None)


@dataclass(frozen=True)
class _Writer:
    """A chat as the text that a model reads; without a template its messages, an empty line between them."""

    template: ChatTemplate | None

    def __call__(self, chat: Mapping[str, Any]) -> str:
        messages = prepare(chat["messages"])
        if self.template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        return self.template.render(
            messages, tools=prepare_tools(chat.get("tools")), add_generation_prompt=False
        )


def _cut(texts: Iterator[list[int]], length: int) -> Iterator[tuple[int, ...]]:
    """One long text, cut into sequences of `length`; the last one is shorter."""
    rest: list[int] = []
    for ids in texts:
        rest += ids
        while len(rest) >= length:
            yield tuple(rest[:length])
            del rest[:length]
    yield tuple(rest)


def _pack(texts: Iterable[list[int]], length: int) -> Iterator[tuple[int, ...]]:
    """Whole texts, several to a sequence as long as they fit; one that is longer than `length` is cut."""
    rest: list[int] = []
    for ids in texts:
        if rest and len(rest) + len(ids) > length:
            yield tuple(rest)
            rest = []
        rest += ids
        while len(rest) > length:
            yield tuple(rest[:length])
            del rest[:length]
    yield tuple(rest)


def _check(tokens: int, length: int) -> None:
    if length < 2 or tokens < 2:
        raise RequestError(f"expected at least 2 tokens in sequences of at least 2, got {tokens} in {length}")


def checked(file: Path) -> bytes:
    """The content of a file that `Corpus.from_file` could use, as far as can be told without a tokenizer: it costs
    nothing yet to be wrong. Raises `RequestError`."""
    text = _read(file)
    if file.suffix == ".jsonl":
        for _ in _entries(file, text):
            pass
    return text.encode()


def _read(file: Path) -> str:
    try:
        text = file.expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{file}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None
    except (RuntimeError, ValueError) as error:  # ~nobody, a zero byte
        raise RequestError(f"{file}: cannot be read: {error}".rstrip(".")) from None
    if not text.strip():
        raise RequestError(f"{file}: the file is empty")
    return text


def _beginning(tokenizer: Tokenizer, text: str, tokens: int) -> list[int]:
    """The first `tokens` ids of a text and some more, or all: of a large file most would be encoded for nothing."""
    size = _CHARACTERS * tokens
    while size < len(text):
        # twice as many: what the cut does to the ids at the end does not reach those that are taken
        if len(ids := tokenizer.encode(text[:size])) >= 2 * tokens:
            return ids
        size *= 4
    return tokenizer.encode(text)


def _entries(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its place."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(entry, dict) or not ("messages" in entry or isinstance(entry.get("text"), str)):
            raise RequestError(f'{where}: expected an object with "text", a string, or "messages"')
        yield where, entry


def _lines(file: Path, text: str, folder: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of the texts of a .jsonl file, one a line."""
    write: _Writer | None = None
    for where, entry in _entries(file, text):
        if "messages" in entry and write is None:
            # the user's chats want the model's own template: without one the text would be another
            write = _Writer(ChatTemplate.open(folder))
        try:
            ids = tokenizer.encode(write(entry) if write and "messages" in entry else entry["text"])
        except (RequestError, TemplateError, TokenizerError) as error:
            raise RequestError(f"{where}: {error}") from None
        yield ids
