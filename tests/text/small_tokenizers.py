"""Trains tokenizers of a few hundred tokens with the structure of the real ones."""

from __future__ import annotations

import io

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SAMPLES = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "Grüße aus Köln; déjà vu; señor; Łódź; ação.",
    "Привет, мир! Как дела? Съешь ещё этих мягких французских булок.",
    "你好，世界。今天天气很好。 こんにちは世界 안녕하세요 세계",
    "नमस्ते दुनिया, आप कैसे हैं? ก็ต้องทำ สวัสดีชาวโลก",
    "مرحبا بالعالم שלום עולם",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "def f(x):\n\treturn {'a': x ** 2}\n",
]


def trained_byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN3_5), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES * 4, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False) for token in NOT_SPECIAL])
    return tokenizer


def trained_sentencepiece(**settings: object) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLES * 20),
        model_writer=out,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        user_defined_symbols=["<tool_call>", "</tool_call>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return out.getvalue()
