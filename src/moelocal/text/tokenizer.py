"""Text to token ids and back, from the tokenizer files of a checkpoint.

Two kinds of file are read: `tokenizer.json` (library tokenizers; byte-level, Metaspace and byte-fallback
vocabularies) and `tokenizer.model` (library sentencepiece). Decoding is ours, from the bytes of each token,
so that the streaming `Detokenizer` and `Tokenizer.decode` cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moelocal.errors import TokenizerError
from moelocal.text.vocabulary import JsonVocabulary, SentencePieceVocabulary


class Vocabulary(Protocol):
    """What `Tokenizer` needs from a tokenizer library."""

    @property
    def strips_first_space(self) -> bool:
        """Whether encoding puts a space before the text, which decoding must take away again."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which the strings of added tokens stand for those tokens."""

    def piece(self, token: int) -> tuple[bytes, bool] | None:
        """The bytes that a token writes, and whether it is special; None for an id without a token."""

    def id_of(self, string: str) -> int | None:
        """The id of the token of this name."""

    def ids(self) -> Iterable[int]:
        """The ids of all tokens, added ones included."""


class Tokenizer:
    """Encodes and decodes; knows which ids are tokens.

    Special tokens are those marked so in the files; decoding leaves them out. Added tokens that are not
    special, such as `<think>` and `<tool_call>` of the Qwen models, always stay in the text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pieces: dict[int, tuple[bytes, bool]] = {}
        self.strips_first_space = vocabulary.strips_first_space

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, else `tokenizer.model`.

        Raises TokenizerError when neither file is there or the one found cannot be read.
        """
        if (folder / "tokenizer.json").is_file():
            return cls(JsonVocabulary.open(folder / "tokenizer.json"))
        if (folder / "tokenizer.model").is_file():
            return cls(SentencePieceVocabulary.open(folder / "tokenizer.model"))
        raise TokenizerError(
            f"{folder}: neither tokenizer.json nor tokenizer.model is there, so texts cannot be encoded; "
            "copy the tokenizer files of the original model into this folder"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Strings of special tokens become those tokens; no token is put before it.

        Raises TokenizerError when the text holds a lone surrogate, which no encoding of text can express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text cannot be encoded: character {error.start} is U+{ord(text[error.start]):04X}, "
                "half of a surrogate pair; decode the input as UTF-8 first"
            ) from error
        return self._vocabulary.encode(text)

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """The text of `tokens`. Bytes that are no UTF-8 become U+FFFD.

        Raises TokenizerError for an id without a token.
        """
        pieces = (self._piece(token) for token in tokens)
        data = b"".join(piece for piece, special in pieces if not (special and skip_special))
        if self.strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes that one token adds to the text; empty for a special token.

        Raises TokenizerError for an id without a token.
        """
        piece, special = self._piece(token)
        return b"" if special else piece

    def is_token(self, token: int) -> bool:
        """Whether this id is a token (a vocabulary is often padded to more rows than it has tokens)."""
        return self._vocabulary.piece(token) is not None

    def id_of(self, string: str) -> int | None:
        """The id of the token written exactly like this in the vocabulary, such as `<|im_end|>`."""
        return self._vocabulary.id_of(string)

    @cached_property
    def tokens(self) -> frozenset[int]:
        """All ids that are tokens."""
        return frozenset(self._vocabulary.ids())

    @property
    def size(self) -> int:
        """Number of tokens, padding rows not counted."""
        return len(self.tokens)

    def token_mask(self, rows: int) -> npt.NDArray[np.bool_]:
        """[rows] bool: True where a row of the output matrix is a token. Only those may be sampled.

        Raises TokenizerError when the tokenizer has an id beyond the last row.
        """
        highest = max(self.tokens)
        if highest >= rows:
            raise TokenizerError(
                f"the tokenizer has the token id {highest}, but the model has only {rows} rows "
                f"(ids 0 to {rows - 1}); the tokenizer files belong to another model"
            )
        mask = np.zeros(rows, dtype=np.bool_)
        mask[np.fromiter(self.tokens, dtype=np.int64)] = True
        return mask

    def _piece(self, token: int) -> tuple[bytes, bool]:
        known = self._pieces.get(token)
        if known is None:
            known = self._vocabulary.piece(token)
            if known is None:
                raise TokenizerError(f"token id {token} is not in the vocabulary of {self.size} tokens")
            self._pieces[token] = known
        return known
