"""Train the byte-level BPE of the embedded model: `python tools/embedded/tokenizer.py`.

The pre-tokenizer is that of Qwen3.5, the added tokens have the same strings and flags; ids follow the trained ones.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer as LibraryTokenizer

FOLDER = Path(__file__).parents[2] / "src" / "moelocal" / "embedded"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEARNT = 1400
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single> <|audio_pad|>""".split()
PLAIN = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
<|file_sep|> <tool_response> </tool_response> <think> </think>""".split()


@cache
def open_tokenizer() -> LibraryTokenizer:
    return LibraryTokenizer.open(FOLDER)


@cache
def open_template() -> ChatTemplate:
    return ChatTemplate.open(FOLDER)


def train() -> Tokenizer:
    from data import SKILLS, answer_text, prompt_text, sample

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng, template = random.Random(0), open_template()
    made = [sample(rng.choice(SKILLS), rng) for _ in range(12_000)]
    texts = [prompt_text(s, template) + answer_text(s, template) for s in made]
    for token in SPECIAL + PLAIN:
        texts = [text.replace(token, " ") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNT, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    return tokenizer


def main() -> None:
    tokenizer = train()
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"do_sample": True, "eos_token_id": stop, "pad_token_id": stop[1], "temperature": 0.3, "top_k": 20,
                  "top_p": 0.95}  # fmt: skip
    (FOLDER / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens -> {FOLDER / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
