"""The generator of the embedded model's training data, its tokenizer, and what is shipped of both."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import moelocal
from moelocal.hub import EMBEDDED
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "embedded"))
from data import SKILLS, answer_text, encode, judge, prompt_text, sample

SCRIPTS = "Hello Привет Γεια مرحبا שלום 你好 こんにちは 안녕 नमस्ते สวัสดี Բարեւ გამარჯობა 👩‍👩‍👧 é ß"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(EMBEDDED)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.open(EMBEDDED)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_same_seed_gives_the_same_samples(skill):
    first, second = ([sample(skill, random.Random(f"{seed}")) for seed in range(30)] for _ in range(2))
    assert first == second
    assert len({s.instance for s in first}) > 10


@pytest.mark.parametrize("skill", SKILLS)
def test_no_held_out_instance_is_trained_on(skill):
    rng = random.Random(1)
    trained = {sample(skill, rng, split="train").instance for _ in range(600)}
    held_out = {sample(skill, rng, split="held-out").instance for _ in range(60)}
    assert not trained & held_out
    assert len(held_out) >= 5


@pytest.mark.parametrize("skill", SKILLS)
def test_the_reference_is_judged_right_and_another_answer_wrong(skill, template):
    rng = random.Random(2)
    for _ in range(20):
        made = sample(skill, rng, split="held-out")
        right = answer_text(made, template).removesuffix("<|im_end|>")
        assert judge(made, right, template)
        assert not judge(made, right + " no", template)


@pytest.mark.parametrize("skill", SKILLS)
def test_training_reads_what_the_library_would_ask(skill, tokenizer, template):
    made = sample(skill, random.Random(3))
    ids, weights = encode(made, tokenizer, template)
    prompt = tokenizer.encode(prompt_text(made, template))
    assert ids[: len(prompt)] == prompt and not any(weights[: len(prompt)]) and all(weights[len(prompt) :])
    whole = template.render(made.messages, tools=made.tools, add_generation_prompt=False)
    answer = answer_text(made, template)
    # history is rendered without the empty thinking block of an answer given with thinking off
    assert whole.rstrip("\n").endswith(answer.rpartition("</think>\n\n")[2])
    assert len(ids) <= 640


def test_long_lists_and_long_documents_are_bounded(tokenizer, template):
    rng = random.Random(4)
    lengths = [len(encode(sample("lookup", rng), tokenizer, template)[0]) for _ in range(300)]
    assert 300 < max(lengths) < 640


def test_every_script_survives_the_tokenizer(tokenizer):
    assert tokenizer.decode(tokenizer.encode(SCRIPTS)) == SCRIPTS


def test_the_vocabulary_leaves_padding_rows(tokenizer):
    config = moelocal.load().config
    assert tokenizer.size < config.vocab
    assert tokenizer.id_of("<|im_end|>") is not None and tokenizer.id_of("<think>") is not None


def test_what_is_shipped_is_small():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 12_000_000


@pytest.mark.parity
def test_the_training_network_is_the_shipped_architecture(tmp_path):
    """The network that is trained, exported, equals the library and transformers on the same weights."""
    import mlx.core as mx
    import numpy as np
    import torch
    from export import export
    from model import Embedded
    from transformers import AutoConfig, Qwen3_5MoeForCausalLM

    torch.manual_seed(0)
    network = Embedded()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "norm" in name:  # with so few bits that neither w nor 1 + w is rounded by the export
                p.add_((torch.randn_like(p) * 0.2 * 64).round() / 64)
            p.copy_(p.bfloat16().float())
    (tmp_path / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())
    export(network, tmp_path)
    ids = torch.randint(0, 1400, (2, 75))
    with torch.no_grad():
        expected = network(ids).numpy()
    ours = np.array(moelocal.load(tmp_path, dtype="float32")(mx.array(ids.numpy())))
    text = AutoConfig.from_pretrained(tmp_path).text_config
    original = Qwen3_5MoeForCausalLM(text).eval().float()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("mtp.")}
    original.load_state_dict(state)
    with torch.no_grad():
        theirs = original(ids).logits.numpy()
    # float32 in three formulations; logits of about 1
    assert np.abs(ours - expected).max() < 5e-4
    assert np.abs(theirs - expected).max() < 5e-4
