"""Streaming text equals decoded text, in every script, whatever the tokens cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.text.detokenizer import Detokenizer
from moelocal.text.tokenizer import Tokenizer
from text.small_tokenizers import SAMPLES


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(token) for token in tokens] + [detokenizer.finish()]


@given(text=st.text(max_size=60))
def test_stream_equals_decode(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@given(data=st.data())
def test_any_tokens_at_all(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.sampled_from(sorted(tokenizer.tokens)), max_size=30))
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("text", SAMPLES)
def test_every_prefix_is_a_prefix_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    shown = ""
    for piece in streamed(tokenizer, tokenizer.encode(text)):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_a_character_of_four_tokens_comes_at_once(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("🦖")
    assert len(tokens) >= 3
    pieces = streamed(byte_level, tokens)
    assert pieces == [""] * (len(tokens) - 1) + ["🦖", ""]


def test_an_incomplete_character_at_the_end(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("🦖")[:-1]
    assert streamed(byte_level, tokens) == [""] * len(tokens) + ["\ufffd"]


def test_bytes_that_later_bytes_prove_invalid(byte_level: Tokenizer) -> None:
    (lead, *_), (letter,) = byte_level.encode("🦖"), byte_level.encode("a")
    assert streamed(byte_level, [lead, letter]) == ["", "\ufffda", ""]


def test_special_tokens_write_nothing(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("a<|im_end|>b<think>")
    assert streamed(byte_level, tokens) == ["a", "", "b", "<think>", ""]


def test_the_first_space_of_sentencepiece_is_not_text(sentencepiece_tokenizer: Tokenizer) -> None:
    text = " the dog the dog"
    tokens = sentencepiece_tokenizer.encode(text)
    assert "".join(streamed(sentencepiece_tokenizer, tokens)) == text
