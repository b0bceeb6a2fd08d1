"""Sampled tokens to text, as they come, without ever splitting a character."""

from __future__ import annotations

import codecs

from moelocal.text.tokenizer import Tokenizer


class Detokenizer:
    """Feeds on one token at a time and gives back the text that is certain.

    A character whose bytes are spread over several tokens comes out with its last byte. U+FFFD appears only
    for bytes that cannot be part of any UTF-8 text. Joined, the output equals `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space

    def add(self, token: int) -> str:
        """The text completed by this token, often empty. Raises TokenizerError for an id without a token."""
        data = self._tokenizer.bytes_of(token)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD when the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
