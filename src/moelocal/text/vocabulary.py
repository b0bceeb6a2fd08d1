"""The two kinds of vocabulary behind `Tokenizer`, each reduced to: encode, bytes of a token, ids.

Why not the decoders of the libraries: they decode whole sequences only, and put U+FFFD where a token ends
inside a character, so a stream could not be cut anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from moelocal.errors import TokenizerError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte-fallback token


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class JsonVocabulary:
    """`tokenizer.json`, through the library tokenizers."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, byte_level: bool, strips_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._byte_level = byte_level
        self._byte_of = _byte_of_character()
        self._added = tokenizer.get_added_tokens_decoder()
        self.strips_first_space = strips_first_space

    @classmethod
    def open(cls, path: Path) -> JsonVocabulary:
        """Raises TokenizerError when the file is damaged or decodes by a rule that is unknown here."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            if tokenizer.get_vocab_size() == 0:
                raise ValueError("it has no tokens")
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise TokenizerError(
                f"{path}: not a readable tokenizer file ({error}); download it again"
            ) from error
        # A file may carry the settings of a training run, which would cut or pad prompts silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The state of the decoder object is its JSON: cheaper than reading a file of many megabytes twice.
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
        kinds = {part.get("type") for part in parts}
        if "ByteLevel" in kinds:
            return cls(tokenizer, byte_level=True, strips_first_space=False)
        if kinds & {"Metaspace", "ByteFallback", "Replace"}:
            strips = any(_strips_first_space(part) for part in parts)
            return cls(tokenizer, byte_level=False, strips_first_space=strips)
        raise TokenizerError(
            f"{path}: the decoder {decoder.get('type')!r} is not supported; "
            "expected ByteLevel, Metaspace or ByteFallback"
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token: int) -> tuple[bytes, bool] | None:
        added = self._added.get(token)
        if added is not None:
            return added.content.encode("utf-8"), added.special
        string = self._tokenizer.id_to_token(token) if 0 <= token < 1 << 32 else None
        if string is None:
            return None
        if not self._byte_level:
            return _sentencepiece_bytes(string), False
        if all(character in self._byte_of for character in string):
            return bytes(self._byte_of[character] for character in string), False
        return string.encode("utf-8"), False

    def id_of(self, string: str) -> int | None:
        token: int | None = self._tokenizer.token_to_id(string)
        return token

    def ids(self) -> Iterable[int]:
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return ids.values()


def _strips_first_space(decoder: Mapping[str, Any]) -> bool:
    if decoder.get("type") == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never")
    return bool(
        decoder.get("type") == "Strip" and decoder.get("content") == " " and decoder.get("start", 0) > 0
    )


def _sentencepiece_bytes(string: str) -> bytes:
    byte = _BYTE.fullmatch(string)
    return bytes([int(byte[1], 16)]) if byte else string.replace(_SPACE, " ").encode("utf-8")


class SentencePieceVocabulary:
    """`tokenizer.model`, through the library sentencepiece, with the added tokens of `tokenizer_config.json`.

    Sentencepiece itself never reads a control symbol or an added token from a text. The text is therefore cut
    at their strings, and each part encoded alone; where the model puts a space before a text, it does so
    before each part.
    """

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, added: Mapping[int, tuple[str, bool]]
    ) -> None:
        self._processor = processor
        self._strings: list[str] = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
        self._added = dict(added)
        for token, string in enumerate(self._strings):
            if processor.is_control(token):
                self._added.setdefault(token, (string, True))
        self._id_of_added = {string: token for token, (string, _) in self._added.items()}
        longest_first = sorted(self._id_of_added, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.strips_first_space = self._probe_first_space()

    @classmethod
    def open(cls, path: Path) -> SentencePieceVocabulary:
        """Raises TokenizerError when `path` or the `tokenizer_config.json` beside it is damaged."""
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            if processor.vocab_size() == 0:
                raise RuntimeError("it has no tokens")
            return cls(processor, _added_tokens(path.with_name("tokenizer_config.json")))
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"{path}: not a readable sentencepiece model ({error}); download it again"
            ) from error

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        start = 0
        for match in self._cut.finditer(text) if self._cut else ():
            tokens += self._processor.encode(text[start : match.start()])
            tokens.append(self._id_of_added[match[0]])
            start = match.end()
        return tokens + list(self._processor.encode(text[start:]))

    def piece(self, token: int) -> tuple[bytes, bool] | None:
        if token in self._added:
            string, special = self._added[token]
            return string.encode("utf-8"), special
        if not 0 <= token < len(self._strings):
            return None
        if self._processor.is_unknown(token):
            return self._processor.decode([token]).encode("utf-8"), False
        return _sentencepiece_bytes(self._strings[token]), False

    def id_of(self, string: str) -> int | None:
        if string in self._id_of_added:
            return self._id_of_added[string]
        token = self._processor.piece_to_id(string)  # the id of the unknown token if there is no such piece
        return token if self._strings[token] == string else None

    def ids(self) -> Iterable[int]:
        return {*range(len(self._strings)), *self._added}

    def _probe_first_space(self) -> bool:
        """Ask the model by decoding one token: its normalizer settings are not in the public interface."""
        for token, string in enumerate(self._strings):
            if string.startswith(_SPACE):
                return not self._processor.decode([token]).startswith(" ")
        return False


def _added_tokens(path: Path) -> dict[int, tuple[str, bool]]:
    """`added_tokens_decoder` of tokenizer_config.json, id to string and `special`; empty without it."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        return {
            int(token): (str(entry["content"]), bool(entry.get("special")))
            for token, entry in entries.items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path}: added_tokens_decoder is not readable ({error!r})") from error
