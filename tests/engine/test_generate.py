"""`load`, `generate` and `stream` on the embedded model."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np
import pytest

import moelocal
from moelocal.engine import chunks
from moelocal.errors import (
    ContextOverflow,
    ModelNotFound,
    NumericsError,
    RequestError,
    TemplateError,
    TokenizerError,
)
from moelocal.hub import EMBEDDED
from moelocal.ops import force

GREEDY = moelocal.Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> moelocal.Model:
    return moelocal.load()


@pytest.fixture
def untexted(tmp_path) -> moelocal.Model:
    """The embedded weights in a folder without tokenizer and template."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(EMBEDDED / name, tmp_path / name)
    return moelocal.load(tmp_path)


def test_events_add_up_to_the_completion(model):
    events = list(moelocal.stream(model, "Hello!", max_tokens=60, seed=1))
    done = events[-1].completion
    assert done is not None and all(event.completion is None for event in events[:-1])
    assert "".join(event.text for event in events) == done.text
    assert "".join(event.reasoning for event in events) == done.reasoning
    assert tuple(t for event in events for t in event.tokens) == done.tokens
    assert done.usage.completion == len(done.tokens) and done.usage.prompt > 0
    assert 0 < done.timing.first_token_seconds <= done.timing.total_seconds
    assert done.timing.peak_memory_nbytes > 0


def test_an_answer_ends_at_the_stop_token_which_is_no_text(model):
    done = moelocal.generate(model, "Hello!", max_tokens=200, sampling=GREEDY)
    assert done.finish_reason == "stop"
    assert done.tokens[-1] in model.stop_tokens
    assert "<|im_end|>" not in done.text


def test_tokens_are_what_the_model_itself_prefers(model):
    done = moelocal.generate(
        model, "Sort these words: pear, apple, fig", max_tokens=12, sampling=GREEDY, raw=True
    )
    prompt = model.tokenizer.encode("Sort these words: pear, apple, fig")
    whole = model(mx.array([prompt + list(done.tokens)]))
    choices = mx.argmax(whole[0, len(prompt) - 1 : -1, : model.tokenizer.size], axis=-1)
    assert choices.tolist() == list(done.tokens)


def test_a_seed_repeats_an_answer_and_another_seed_does_not(model):
    hot = moelocal.Sampling(temperature=3.0)
    answers = [
        moelocal.generate(model, "Hello!", max_tokens=12, seed=seed, sampling=hot).tokens
        for seed in (4, 4, 5)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_max_tokens_ends_an_answer_with_length(model):
    done = moelocal.generate(model, "Hello!", max_tokens=2, sampling=GREEDY)
    assert done.finish_reason == "length" and len(done.tokens) == 2


def test_closing_the_stream_stops_the_generation(model, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "decoder", Counting(model.decoder, calls))
    events = moelocal.stream(
        model, "Hello!", max_tokens=500, sampling=moelocal.Sampling(temperature=5.0), seed=1
    )
    for _ in range(3):
        next(events)
    events.close()
    assert len(calls) <= 5  # the prompt, three tokens, and the one queued ahead


class Counting:
    """A decoder that notes its calls."""

    def __init__(self, decoder, calls):
        self.decoder, self.calls = decoder, calls

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def __call__(self, tokens, cache=None, rows=None):
        self.calls.append(tokens.shape)
        return self.decoder(tokens, cache, rows)


def test_a_long_prompt_is_read_in_chunks_at_absolute_multiples(model, monkeypatch):
    monkeypatch.setattr(chunks, "STRIDE", 16)
    calls = []
    monkeypatch.setattr(model, "decoder", Counting(model.decoder, calls))
    tokens = list(range(40))
    session = model.session()
    session.sync(tokens)
    assert calls == [(1, 16), (1, 16), (1, 8)] and session.position == 40
    whole = model(mx.array([tokens]), rows=1)[0, -1]
    # chunks of 16 rows run other products than the whole: float32 rounding
    np.testing.assert_allclose(np.array(session.logits), np.array(whole), atol=1e-3)


def test_stop_strings_end_raw_text_and_are_left_out(model):
    prompt = "<|im_start|>user\nDraw a red circle as SVG.<|im_end|>\n<|im_start|>assistant\n<svg"
    free = moelocal.generate(model, prompt, raw=True, max_tokens=30, sampling=GREEDY)
    cut = free.text[3:6]
    assert len(cut) == 3
    done = moelocal.generate(model, prompt, raw=True, max_tokens=30, sampling=GREEDY, stop=[cut])
    assert done.finish_reason == "stop"
    assert done.text == free.text[: free.text.index(cut)]


def test_thinking_is_kept_apart_and_can_be_switched_off(model):
    question = "What is 12 + 7?"
    on = moelocal.generate(model, question, max_tokens=120, sampling=GREEDY)
    off = moelocal.generate(model, question, max_tokens=120, sampling=GREEDY, thinking=False)
    assert on.reasoning and "think>" not in on.reasoning + on.text
    assert not off.reasoning


def test_logprobs_are_those_of_the_raw_logits(model):
    done = moelocal.generate(model, "Hello", raw=True, max_tokens=5, sampling=GREEDY, logprobs=2)
    prompt = model.tokenizer.encode("Hello")
    logits = model(mx.array([prompt + list(done.tokens)]))[0]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, entry in enumerate(done.logprobs):
        row = expected[len(prompt) - 1 + i]
        assert entry.token == done.tokens[i] == entry.top[0][0]
        # one token at a time against all at once, in float32
        assert abs(entry.logprob - row[entry.token].item()) < 1e-3
        assert len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1]


def test_rows_without_a_token_are_never_sampled(model):
    biased = moelocal.Sampling(temperature=5.0, logit_bias={model.config.vocab - 1: 100.0})
    done = moelocal.generate(model, "Hello!", max_tokens=30, seed=2, sampling=biased)
    assert all(model.tokenizer.is_token(token) for token in done.tokens)


def test_the_forms_of_the_ops_give_the_same_answer(model):
    answers = {}
    for form in ("auto", "portable", "reference"):
        with force(form):
            answers[form] = moelocal.generate(model, "Hello!", max_tokens=15, sampling=GREEDY).tokens
    assert answers["auto"] == answers["portable"] == answers["reference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1, got 0"),
        ({"max_tokens": -3}, "max_tokens: expected an integer from 1, got -3"),
        ({"max_tokens": True}, "max_tokens: expected an integer from 1, got True"),
        ({"logprobs": -1}, "logprobs: expected an integer from 0, or None, got -1"),
        ({"stop": "x"}, "stop: expected a list of strings, got the string 'x'"),
        ({"seed": "a"}, "seed: expected an integer or None, got 'a'"),
        (
            {"raw": True, "thinking": True},
            "raw=True continues plain text: thinking and tools need the chat template",
        ),
    ],
)
def test_bad_requests_are_refused_before_the_first_event(model, arguments, message):
    with pytest.raises(RequestError) as caught:
        moelocal.stream(model, "Hello!", **arguments)
    assert str(caught.value) == message


def test_an_empty_raw_prompt_is_refused(model):
    with pytest.raises(RequestError, match="expected at least one token, got an empty text"):
        moelocal.stream(model, "", raw=True)


def test_a_prompt_over_the_context_is_refused_with_both_figures(model):
    with pytest.raises(
        ContextOverflow, match=r"the prompt has \d+ tokens, the context of embedded 4096; shorten it"
    ):
        moelocal.stream(model, "a b c d e f " * 1500)


def test_an_answer_ends_where_the_context_ends(model, monkeypatch):
    config = model.config
    prompt = len(model.tokenizer.encode("Hello"))
    shrunk = type(config)(**{f: getattr(config, f) for f in config.__slots__} | {"context": prompt + 3})
    monkeypatch.setattr(model.decoder, "config", shrunk)
    done = moelocal.generate(model, "Hello", raw=True, sampling=moelocal.Sampling(temperature=5.0), seed=3)
    assert len(done.tokens) <= 3


def test_nan_logits_are_an_error_and_no_token(model, monkeypatch):
    embed = model.decoder.embed
    monkeypatch.setattr(model.decoder, "embed", lambda tokens: embed(tokens) * mx.nan)
    with pytest.raises(NumericsError, match="the logits of token 1 are NaN or infinite"):
        moelocal.generate(model, "Hello!", max_tokens=3)


def test_a_folder_without_texts_computes_but_cannot_read_text(untexted, model):
    tokens = mx.array([[5, 6, 7]])
    assert mx.array_equal(untexted(tokens), model(tokens))
    with pytest.raises(TemplateError, match="no chat template"):
        moelocal.generate(untexted, "Hello!")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        moelocal.generate(untexted, "Hello!", raw=True)


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "one", "a b/c"])
def test_what_is_neither_folder_nor_name_is_not_found(name):
    with pytest.raises(ModelNotFound, match="a model is a folder or a Hugging Face name like owner/name"):
        moelocal.load(name)


def test_offline_says_so_when_the_cache_has_nothing():
    with pytest.raises(ModelNotFound, match="not in the local cache, and offline was asked for"):
        moelocal.load("moelocal-tests/not-there", offline=True, progress=False)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(RequestError, match="dtype: expected one of float32, float16, bfloat16, got 'int8'"):
        moelocal.load(dtype="int8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_nearly_the_same_logits(model, dtype):
    half = moelocal.load(dtype=dtype)
    tokens = mx.array([model.tokenizer.encode("Hello! What is 12 + 7?")])
    exact, rounded = model(tokens), half(tokens)
    assert rounded.dtype == mx.float32
    # 8 layers of roundings to 2^-8 (bfloat16) on logits of about 10; measured 0.15
    assert mx.mean(mx.abs(exact - rounded)).item() < 0.5


def test_a_slow_load_shows_a_bar_on_a_terminal_only(monkeypatch, capsys):
    from moelocal.engine import progress

    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    moelocal.load()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    moelocal.load(progress=False)
    assert capsys.readouterr().err == ""
    moelocal.load()
    assert "loading the weights" in capsys.readouterr().err
