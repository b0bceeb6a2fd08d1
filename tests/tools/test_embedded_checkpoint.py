"""The shipped checkpoint itself, in the original implementations: same logits, same greedy tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moelocal.hub import EMBEDDED
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer

SHIPPED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
           "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip


def test_the_folder_holds_what_a_release_holds():
    assert {file.name for file in EMBEDDED.iterdir() if file.is_file()} >= SHIPPED
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe"
    stop = json.loads((EMBEDDED / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = Tokenizer.open(EMBEDDED)
    assert stop == [tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")]


def text_of_transformers(ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of the text-only class: the wrapper would add a vision tower of random weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, Qwen3_5MoeForCausalLM

    stored = load_file(EMBEDDED / "model.safetensors")
    weights = {
        name.replace("model.language_model.", "model."): tensor.float()
        for name, tensor in stored.items()
        if not name.startswith("mtp.")
    }
    network = Qwen3_5MoeForCausalLM(AutoConfig.from_pretrained(EMBEDDED).text_config).eval().float()
    network.load_state_dict(weights)
    with torch.no_grad():
        return network(torch.from_numpy(ids[None])).logits[0].numpy()


@pytest.mark.parity
def test_the_original_implementations_give_the_same_logits_and_tokens():
    import mlx.core as mx

    import moelocal
    from parity.originals import MlxLm

    tokenizer = Tokenizer.open(EMBEDDED)
    prompt = ChatTemplate.open(EMBEDDED).render([{"role": "user", "content": "What is 23 + 48?"}])
    start = tokenizer.encode(prompt)
    network = moelocal.load(dtype="float32")
    # greedy, without the library's own sampling: 24 tokens
    ids = list(start)
    for _ in range(24):
        ids.append(int(mx.argmax(network(mx.array([ids]))[0, -1]).item()))
    sequence = np.array(ids)
    expected = np.array(network(mx.array(sequence[None])))[0]
    for name, logits in (
        ("transformers", text_of_transformers(sequence)),
        ("mlx-lm", MlxLm(EMBEDDED).logits(sequence)),
    ):
        # float32 in three formulations; trained logits are of the order of 20
        assert np.abs(logits - expected)[:, : tokenizer.size].max() < 5e-3, name
        chosen = logits[len(start) - 1 : -1].argmax(-1)
        assert chosen.tolist() == ids[len(start) :], name
