"""Tokenizers of both kinds: round trips in every script, special tokens, padding rows, damaged files."""

from __future__ import annotations

import json
import re
import unicodedata
from importlib.resources import files
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from moelocal.errors import TokenizerError
from moelocal.text.generation_config import GenerationDefaults
from moelocal.text.tokenizer import Tokenizer
from text.small_tokenizers import NOT_SPECIAL, SAMPLES, SPECIAL, trained_byte_level, trained_sentencepiece

# NFC, as the byte-level tokenizer normalizes.
TEXTS = st.text(max_size=60).map(lambda text: unicodedata.normalize("NFC", text))


@given(text=TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip_of_scripts(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50)
@given(text=TEXTS)
def test_ids_are_those_of_the_library(byte_level_folder: Path, byte_level: Tokenizer, text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    tokens = byte_level.encode(text)
    assert tokens == library.encode(text, add_special_tokens=False).ids
    assert byte_level.decode(tokens) == library.decode(tokens)


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_characters="<")))
def test_sentencepiece_decodes_as_its_library(
    sentencepiece_folder: Path, sentencepiece_tokenizer: Tokenizer, text: str
) -> None:
    library = sentencepiece.SentencePieceProcessor(str(sentencepiece_folder / "tokenizer.model"))
    tokens = library.encode(text)
    assert sentencepiece_tokenizer.encode(text) == tokens
    assert sentencepiece_tokenizer.decode(tokens) == library.decode(tokens)


@pytest.mark.parametrize(
    "settings_of_model",
    [
        {},
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity"},
    ],
)
def test_the_first_space_of_sentencepiece(tmp_path: Path, settings_of_model: dict[str, object]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained_sentencepiece(**settings_of_model))
    tokenizer = Tokenizer.open(tmp_path)
    library = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in ("the dog", " the dog", "dog"):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == library.decode(tokens)


EMBEDDED = Path(str(files("moelocal"))) / "embedded"


@pytest.mark.skipif(not (EMBEDDED / "tokenizer.json").is_file(), reason="no embedded model in this checkout")
def test_the_embedded_tokenizer() -> None:
    tokenizer = Tokenizer.open(EMBEDDED)
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for string in (*SPECIAL, *NOT_SPECIAL):
        assert tokenizer.encode(string) == [tokenizer.id_of(string)]
    assert tokenizer.decode(tokenizer.encode("".join(SPECIAL + NOT_SPECIAL))) == "".join(NOT_SPECIAL)
    defaults = GenerationDefaults.open(EMBEDDED, ())
    assert tokenizer.id_of("<|im_end|>") in defaults.stop_tokens <= tokenizer.tokens


def test_special_tokens_are_parsed_and_left_out(byte_level: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>"
    tokens = byte_level.encode(text)
    assert tokens[0] == byte_level.id_of("<|im_start|>")
    assert tokens[-1] == byte_level.id_of("<|im_end|>")
    assert byte_level.decode(tokens) == "user\nHi"
    assert byte_level.decode(tokens, skip_special=False) == text
    assert byte_level.bytes_of(tokens[0]) == b""


@pytest.mark.parametrize("string", NOT_SPECIAL)
def test_added_tokens_that_are_not_special_stay(byte_level: Tokenizer, string: str) -> None:
    (token,) = byte_level.encode(string)
    assert byte_level.decode([token]) == string
    assert byte_level.bytes_of(token) == string.encode()


def test_added_token_beyond_ascii(tmp_path: Path) -> None:
    # The byte-level decoder of the library takes the é of an added token for one byte and prints U+FFFD.
    tokenizer = trained_byte_level()
    tokenizer.add_tokens(["<café>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.open(tmp_path)
    assert ours.decode(ours.encode("a <café> b")) == "a <café> b"


def test_added_tokens_of_sentencepiece(tmp_path: Path, sentencepiece_folder: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    added = {
        "700": {"content": "<|im_end|>", "special": True},
        "701": {"content": "<think>", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.open(tmp_path)
    tokens = tokenizer.encode("<think>Hi<|im_end|></s>")
    assert tokens[0] == 701
    assert tokens[-2:] == [700, tokenizer.id_of("</s>")]
    assert tokenizer.decode(tokens) == "<think> Hi"
    assert tokenizer.decode(tokens, skip_special=False) == "<think> Hi<|im_end|></s>"


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    tokenizer = trained_byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.open(tmp_path)
    text = "The quick brown fox"
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    ],
)
def test_json_with_sentencepiece_pieces(tmp_path: Path, decoder: decoders.Decoder) -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "▁dog": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.open(tmp_path)
    assert ours.decode([1, 2, 3]) == "the dogs" == tokenizer.decode([1, 2, 3])
    assert ours.decode([1, 4, 5]) == "theé"


def test_mask_of_padded_rows(byte_level: Tokenizer) -> None:
    rows = byte_level.size + 13
    mask = byte_level.token_mask(rows)
    assert mask.shape == (rows,)
    assert mask.sum() == byte_level.size
    assert not mask[byte_level.size :].any()
    assert byte_level.is_token(0)
    assert not byte_level.is_token(byte_level.size)
    assert byte_level.id_of("<|endoftext|>") in byte_level.tokens
    assert byte_level.id_of("<|nothing|>") is None
    assert len(SPECIAL) + len(NOT_SPECIAL) < byte_level.size


def test_mask_with_gaps(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.open(tmp_path).token_mask(5).tolist() == [True, False, False, True, False]


def test_more_tokens_than_rows(byte_level: Tokenizer) -> None:
    highest = max(byte_level.tokens)
    with pytest.raises(
        TokenizerError,
        match=re.escape(
            f"the tokenizer has the token id {highest}, but the model has only 10 rows (ids 0 to 9); "
            "the tokenizer files belong to another model"
        ),
    ):
        byte_level.token_mask(10)


@pytest.mark.parametrize("token", [-1, 10**6, 2**32, 2**70])
def test_unknown_id(tokenizer: Tokenizer, token: int) -> None:
    message = f"token id {token} is not in the vocabulary of {tokenizer.size} tokens"
    with pytest.raises(TokenizerError, match=re.escape(message)):
        tokenizer.decode([token])
    with pytest.raises(TokenizerError, match=re.escape(message)):
        tokenizer.bytes_of(token)


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        TokenizerError,
        match=re.escape(
            "the text cannot be encoded: character 2 is U+D83D, half of a surrogate pair; "
            "decode the input as UTF-8 first"
        ),
    ):
        tokenizer.encode("ab\ud83d")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError,
        match=re.escape(
            f"{tmp_path}: neither tokenizer.json nor tokenizer.model is there, so texts cannot be encoded; "
            "copy the tokenizer files of the original model into this folder"
        ),
    ):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(f"{path}: not a readable tokenizer file (")):
        Tokenizer.open(tmp_path)


def test_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.open(tmp_path)
    assert str(caught.value) == f"{path}: not a readable tokenizer file (it has no tokens); download it again"


def test_unknown_decoder(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        TokenizerError, match="the decoder 'WordPiece' is not supported; expected ByteLevel, "
    ):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 1000])
def test_damaged_sentencepiece(tmp_path: Path, sentencepiece_folder: Path, length: int) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes()[:length])
    with pytest.raises(TokenizerError, match=re.escape(f"{path}: ")):
        Tokenizer.open(tmp_path)


def test_damaged_added_tokens(tmp_path: Path, sentencepiece_folder: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": 1}}')
    with pytest.raises(TokenizerError, match="added_tokens_decoder is not readable"):
        Tokenizer.open(tmp_path)
