"""A longer context by YaRN, and keys and values in fewer bits: explicit, exact about memory, never mixed up."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

import moelocal
from moelocal import Sampling
from moelocal.cache import AttentionCache
from moelocal.checkpoint.scope import Scope
from moelocal.cli import main
from moelocal.config import AttentionSpec, ModelConfig, Yarn
from moelocal.engine.chunks import STRIDE
from moelocal.engine.plan import plan, weights_nbytes
from moelocal.engine.session import Session
from moelocal.errors import ConfigError, ContextOverflow, MemoryOverflow, RequestError
from moelocal.hub import EMBEDDED
from moelocal.model import Decoder
from parity.checkpoints import Recipe, tokens, write

GREEDY = Sampling(temperature=0)
FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")


def yarns(config: ModelConfig) -> set[Yarn | None]:
    return {layer.mixer.yarn for layer in config.layers if isinstance(layer.mixer, AttentionSpec)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [2, 4, 1.5])
def test_a_context_that_was_asked_for_is_the_model_whose_config_says_yarn(tmp_path, family, factor):
    """`test_transformers.py` compares such configs with the original implementation."""
    plain = write(tmp_path / "plain", Recipe(family, context=64))
    context = int(64 * factor)
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64}
    said = Decoder.open(write(tmp_path / "said", Recipe(family, context=context, rope=rope)))
    asked = Decoder.open(plain, context=context)
    assert asked.config.context == said.config.context == context
    ids = mx.array(tokens(context, 320)[None])
    assert mx.array_equal(asked(ids), said(ids))
    assert not mx.array_equal(asked(ids), Decoder.open(plain)(ids))


def test_fewer_tokens_are_a_limit_and_change_no_weight_of_the_rotation():
    config = ModelConfig.read(EMBEDDED)
    assert yarns(config.with_context(100)) == yarns(config.with_context(config.context)) == {None}
    assert config.with_context(100).context == 100
    model = moelocal.load(context=40)
    with pytest.raises(
        ContextOverflow, match="the prompt has 61 tokens, the context of embedded 40; shorten it"
    ):
        moelocal.generate(model, "a " * 60, raw=True)


def test_a_config_that_says_yarn_is_stretched_from_the_trained_context(tmp_path):
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    config = ModelConfig.read(write(tmp_path / "said", Recipe("qwen3_5_moe", context=64, rope=rope)))
    assert config.context == 128
    assert yarns(config.with_context(100)) == yarns(config)
    (yarn,) = yarns(config.with_context(256))
    assert yarn is not None
    assert (yarn.factor, yarn.original_context, yarn.beta_fast) == (4.0, 64, 16.0)
    assert yarn.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1


@pytest.mark.parametrize("context", [0, -1, 4 * 4096 + 1, 1.5, "8k", True])
def test_a_context_that_cannot_be_is_one_line(context):
    with pytest.raises(RequestError) as caught:
        moelocal.load(context=context)
    assert str(caught.value) == (
        "context: expected 1 to 16384 tokens (trained with 4096; YaRN stretches that at most 4 times), "
        f"got {context!r}"
    )


@pytest.mark.parametrize("bits", [0, 2, 16, 8.0, "8", True])
def test_bits_that_there_are_not_are_one_line(bits):
    with pytest.raises(RequestError) as caught:
        moelocal.load(kv_bits=bits)
    assert str(caught.value) == f"kv_bits: expected 8, 4 or None, got {bits!r}"


def test_heads_that_have_no_groups_are_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    folder = write(tmp_path / "odd", Recipe("qwen3_moe", head_dim=48))

    def read(*_: object) -> None:
        pytest.fail("read a weight")

    monkeypatch.setattr(Scope, "matrix", read)
    with pytest.raises(ConfigError) as caught:
        Decoder.open(folder, kv_bits=8)
    assert str(caught.value) == (
        "kv_bits: heads of 48 elements do not divide into groups of 32; keep keys and values as they are"
    )


def test_the_command_line_refuses_in_one_line(capsys):
    assert main(["generate", "Hi", "--context", "20000"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith(
        "moelocal: error: context: expected 1 to 16384 tokens"
    )
    with pytest.raises(SystemExit) as caught:
        main(["generate", "Hi", "--kv-bits", "3"])
    assert caught.value.code == 2


def error(got: mx.array, expected: mx.array) -> float:
    """Root mean square of the difference over that of the logits."""
    return mx.sqrt(mx.mean(mx.square(got - expected)) / mx.mean(mx.square(expected))).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_token_by_token_is_reading_at_once(tmp_path, family, bits):
    decoder = Decoder.open(write(tmp_path / "model", Recipe(family)), kv_bits=bits)
    ids = mx.array(tokens(60, 320)[None])
    whole, cache = decoder(ids), decoder.new_cache()
    steps = [decoder(ids[:, :37], cache)] + [decoder(ids[:, i : i + 1], cache) for i in range(37, 60)]
    stepped = error(mx.concatenate(steps, axis=1), whole)
    # a sum in another order may move a number to the next of 2^bits codes
    assert stepped < 2.0**-bits
    # that the model became another one by its codes is more than that
    assert error(Decoder.open(tmp_path / "model")(ids), whole) > 5 * stepped


def test_answers_together_are_the_answers_alone():
    model = moelocal.load(kv_bits=4)
    prompts = ["What is 23 + 48?", "Hello!", "Sort these words: pear, apple, cake"]
    together = moelocal.generate(model, prompts, sampling=GREEDY, max_tokens=40)
    for prompt, done in zip(prompts, together, strict=True):
        alone = moelocal.generate(moelocal.load(kv_bits=4), prompt, sampling=GREEDY, max_tokens=40)
        assert done.tokens == alone.tokens


def test_snapshots_of_other_bits_or_another_stretch_are_never_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path))
    ids = tokens(STRIDE + 2, 1000).tolist()

    causes = []

    def cached(**settings: int) -> int:
        model = moelocal.load(snapshots="1GB", **settings)
        reuse = model.session().sync(ids)
        model.store.close()
        causes.append(reuse.miss and (reuse.miss.position, reuse.miss.cause))
        return reuse.cached

    settings = [{}, {"kv_bits": 8}, {"kv_bits": 4}, {"context": 8192}, {"context": 16384}]
    assert [cached(**each) for each in settings] == [0] * 5
    assert causes == [None] + 4 * [(0, "fingerprint")]
    assert all(cached(**each) > 0 for each in settings)
    assert cached(context=STRIDE + 100) > 0  # a limit changes no state
    assert causes[5:] == 6 * [None]


def test_a_session_that_was_saved_with_codes_goes_on_with_them(tmp_path):
    ids = tokens(300, 1000).tolist()
    model = moelocal.load(kv_bits=4)
    session = model.session()
    session.sync(ids[:290])
    session.save(tmp_path / "chat")
    session.sync(ids)
    loaded = Session.load(tmp_path / "chat", moelocal.load(kv_bits=4))
    reuse = loaded.sync(ids)
    assert reuse.cached == 290
    assert mx.allclose(loaded.logits, session.logits, atol=1e-4)
    with pytest.raises(RequestError, match="saved with other weights, settings or another version"):
        Session.load(tmp_path / "chat", moelocal.load(kv_bits=8))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.28125), (4, 0.15625)])
def test_the_plan_counts_codes_exactly(monkeypatch, bits, share):
    decoder = Decoder.open(EMBEDDED, kv_bits=bits)
    monkeypatch.setenv("MOELOCAL_MEMORY", "1000TB")
    made = plan(decoder.config, weights_nbytes(decoder), decoder.dtype, 600, 1, kv_bits=bits)
    cache = decoder.new_cache()
    mx.eval(decoder(mx.array(tokens(600, 1536)[None]), cache, rows=1), cache.arrays)
    assert made.cache == sum(
        a.nbytes for x in cache.layers if isinstance(x, AttentionCache) for a in x.arrays
    )
    plain = plan(decoder.config, weights_nbytes(decoder), decoder.dtype, 600, 1)
    # bits of 32, and of each group of 64 a scale and a bias in float32
    assert made.cache == share * plain.cache


@pytest.mark.parametrize("prompt", [40, 600, 2048])
def test_a_plan_with_codes_is_never_below_what_mlx_held(monkeypatch, prompt):
    monkeypatch.setenv("MOELOCAL_MEMORY", "1000TB")
    decoder = Decoder.open(EMBEDDED, mx.bfloat16, kv_bits=4)
    ids, cache = mx.array(tokens(prompt, 1536)[None]), decoder.new_cache()
    others = mx.get_active_memory() - weights_nbytes(decoder)
    mx.reset_peak_memory()
    for start in range(0, prompt, STRIDE):
        logits = decoder(ids[:, start : start + STRIDE], cache, rows=1)
        mx.eval(logits, cache.arrays)
    for _ in range(3):
        logits = decoder(mx.array([[5]]), cache, rows=1)
        mx.eval(logits, cache.arrays)
    peak = mx.get_peak_memory() - others
    made = plan(decoder.config, weights_nbytes(decoder), decoder.dtype, prompt, 3, kv_bits=4)
    assert peak <= made.nbytes <= 3 * peak  # as without codes: `test_plan.py`


def test_codes_let_a_longer_prompt_fit_where_memory_is_the_limit(monkeypatch):
    config, nbytes = ModelConfig.read(EMBEDDED), 5_000_000
    monkeypatch.setenv("MOELOCAL_MEMORY", str(12_000_000))
    largest = [plan(config, nbytes, mx.bfloat16, 1, 1, kv_bits=bits).largest_context for bits in (None, 8, 4)]
    assert 0 < largest[0] < largest[1] < largest[2] < config.context
    for bits, most in zip((None, 8, 4), largest, strict=True):
        plan(config, nbytes, mx.bfloat16, most - 1, 1, kv_bits=bits).check()
        with pytest.raises(MemoryOverflow, match=f"the largest context that fits has {most} tokens"):
            plan(config, nbytes, mx.bfloat16, most + 1, 1, kv_bits=bits).check()


def test_a_stretched_context_is_planned_for(tmp_path, monkeypatch):
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())
    model = moelocal.load(folder, context=16384)
    monkeypatch.setenv("MOELOCAL_MEMORY", "1GB")
    done = moelocal.generate(model, "a " * 5000, raw=True, max_tokens=3, sampling=GREEDY)
    assert done.usage.prompt > 4096 and len(done.tokens) == 3
    monkeypatch.setenv("MOELOCAL_MEMORY", "20MB")
    with pytest.raises(MemoryOverflow, match="the largest context that fits has"):
        moelocal.generate(model, "b " * 5000, raw=True, max_tokens=3)
