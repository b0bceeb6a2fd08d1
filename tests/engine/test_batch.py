"""Answers of a batch are the answers alone: bit by bit on the CPU device, whatever the other rows do."""

from __future__ import annotations

import gc
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelocal
import offmetal
from engine.test_long_decode import depth, live_arrays
from kernels import quantized
from moelocal import metal
from moelocal.cache import AttentionCache, Cache, RecurrentCache, ragged
from moelocal.cache.ragged import Rows
from moelocal.engine import batch as module
from moelocal.engine.batch import generate_batch, stream_batch
from moelocal.engine.generate import Request
from moelocal.errors import BatchError, ContextOverflow, NumericsError, RequestError
from moelocal.hub import EMBEDDED
from moelocal.model import Decoder
from moelocal.ops import force
from parity.checkpoints import SMALL, Recipe, tokens, write

GREEDY = moelocal.Sampling(temperature=0)
FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")

PROMPTS = (
    "Hello!",
    "Sort these words: pear, apple, fig",
    "What is 12 + 7?",
    "Hello!",
    "Repeat after me: the quick brown fox jumps over the lazy dog. " * 6,
    "Name three colours.",
    "Reverse the word 'stone'.",
    "Count from 5 to 12.",
    "Write a long story about a sailor who counts the words of his own story.",
    "ok",
    "What is the largest of 3, 91, 14 and 15?",
    "Say it in capital letters: moelocal",
)


@pytest.fixture(scope="module")
def model() -> moelocal.Model:
    return moelocal.load()


def alone(model: moelocal.Model, request: Request) -> moelocal.Completion:
    """The answer without any batch, and without snapshots of others."""
    vars(model).pop("store", None)
    return moelocal.generate(
        model,
        request.prompt,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        stop=request.stop,
        seed=request.seed,
        thinking=request.thinking,
        tools=request.tools,
        logprobs=request.logprobs,
        raw=request.raw,
    )


def same(ours: moelocal.Completion, expected: moelocal.Completion) -> bool:
    """Whether everything is equal but times, peak memory and what snapshots saved."""
    fields = ("text", "reasoning", "tool_calls", "tokens", "finish_reason", "logprobs")
    return all(getattr(ours, each) == getattr(expected, each) for each in fields)


class Timelines:
    """Ragged rows on random tokens, and what each gives alone. Row b has a prompt of `lengths[b]` tokens; after that,
    its tokens are given one by one."""

    def __init__(self, decoder: Decoder, lengths: list[int], steps: int) -> None:
        self.decoder, self.lengths = decoder, lengths
        vocab = decoder.config.vocab
        self.sequences = [tokens(length + steps, vocab, row) for row, length in enumerate(lengths)]

    def begun(self, row: int) -> Cache:
        cache = self.decoder.new_cache()
        self.decoder(mx.array(self.sequences[row][None, : self.lengths[row]]), cache, rows=1)
        return cache

    def token(self, row: int, step: int) -> int:
        return int(self.sequences[row][self.lengths[row] + step])

    def alone(self, row: int, steps: int) -> np.ndarray:
        cache = self.begun(row)
        each = [
            np.array(self.decoder(mx.array([[self.token(row, step)]]), cache))[0, 0] for step in range(steps)
        ]
        return np.stack(each)


def steps_of(timelines: Timelines, changes: dict[int, tuple[list[int], list[int]]], steps: int) -> dict:
    """The logits of each row from its first step in the batch on. `changes`: before this step these rows leave, and
    these join."""
    rows, here, caches, given = Rows(), [], {}, {}
    for step in range(steps):
        leaving, joining = changes.get(step, ([], []))
        for row in leaving:
            rows.leave(caches[row])
            here.remove(row)
        for row in joining:
            caches[row], given[row] = timelines.begun(row), []
            rows.join(caches[row])
            here.append(row)
        fed = mx.array([[timelines.token(row, len(given[row]))] for row in here])
        logits = np.array(timelines.decoder.step_rows(fed, rows))
        for place, row in enumerate(here):
            given[row].append(logits[place, 0])
    return {row: np.stack(each) for row, each in given.items()}


def assert_bits(timelines: Timelines, given: dict[int, np.ndarray]) -> None:
    for row, logits in given.items():
        expected = timelines.alone(row, len(logits))
        assert np.array_equal(logits.view(np.uint32), expected.view(np.uint32)), f"row {row}"


COMING_AND_GOING: dict[int, tuple[list[int], list[int]]] = {
    0: ([], [0, 1, 2, 3]),
    3: ([1], []),
    4: ([], [4, 5]),
    6: ([0, 4], [6]),
    8: ([2, 3, 5], []),
}


@pytest.mark.parametrize("name", [*FAMILIES, "embedded", "packed", "bfloat16"])
def test_logits_of_a_row_have_the_bits_that_they_have_alone(tmp_path, name):
    dtype = mx.float32
    if name == "embedded":
        folder = EMBEDDED
    elif name == "packed":
        quantized.write(folder := tmp_path / "packed")
    elif name == "bfloat16":
        folder, dtype = write(tmp_path / "model", Recipe("qwen3_5_moe")), mx.bfloat16
    else:
        folder = write(tmp_path / "model", Recipe(name))
    # across the end of a buffer of 256, and one that is longer than a chunk of the host forms
    timelines = Timelines(Decoder.open(folder, dtype), [3, 250, 40, 1, 17, 300, 255], steps=12)
    assert_bits(timelines, steps_of(timelines, COMING_AND_GOING, steps=10))


@pytest.mark.parametrize("form", ["reference", "portable"])
def test_a_form_that_was_asked_for_holds_in_a_batch(tmp_path, form):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL))
    timelines = Timelines(Decoder.open(folder), [3, 12, 1, 5, 2, 4, 7], steps=12)
    with force(form):
        given = steps_of(timelines, COMING_AND_GOING, steps=10)
        assert_bits(timelines, given)
    if form == "reference":  # the portable form of one token has the same bits compiled
        assert not np.array_equal(given[0], timelines.alone(0, len(given[0])))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="the simulator has run on Linux only")
def test_our_kernels_give_a_row_the_bits_that_they_give_it_alone(tmp_path):
    # what holds on Metal but for MLX's own products, which choose by the number of rows
    quantized.write(folder := tmp_path / "packed")
    timelines = Timelines(Decoder.open(folder), [3, 12, 1], steps=2)
    mx.disable_compile()  # the simulator cannot run inside a traced function
    try:
        before = offmetal.launches()
        with metal.executing(offmetal.emulated_kernel), force("metal"), offmetal.options(checked=False):
            given = steps_of(timelines, {0: ([], [0, 1, 2])}, steps=2)
            kernels_run = offmetal.launches() - before
            assert_bits(timelines, given)
    finally:
        mx.enable_compile()
    names = {name.removeprefix("moelocal_") for name in kernels_run}
    assert {"delta_net", "prologue", "attend_block", "router", "route", "experts_inner", "add_norm"} <= names


def test_the_setting_may_change_between_two_steps():
    timelines = Timelines(Decoder.open(EMBEDDED), [5, 60], steps=3)
    rows = Rows([timelines.begun(0), timelines.begun(1)])
    for step, form in enumerate(("auto", "reference", "auto")):
        with force(form):
            fed = mx.array([[timelines.token(row, step)] for row in (0, 1)])
            logits = timelines.decoder.step_rows(fed, rows)
    expected = np.stack([timelines.alone(row, 3)[-1] for row in (0, 1)])
    # one step in float32 by another formulation; a lost or swapped state gives 1 and more
    assert np.abs(np.array(logits)[:, 0] - expected).max() < 1e-3


@pytest.mark.parametrize("count", [8, 31])
def test_the_number_of_rows_does_not_count(count):
    lengths = [1 + 37 * row % 9 for row in range(count)]
    timelines = Timelines(Decoder.open(EMBEDDED), lengths, steps=2)
    assert_bits(timelines, steps_of(timelines, {0: ([], list(range(count)))}, steps=2))


def test_32_rows_would_be_computed_by_numpy_in_other_bits():
    # why a batch stays below: the control of the tests above
    timelines = Timelines(Decoder.open(EMBEDDED), [1] * 32, steps=1)
    rows = [timelines.begun(row) for row in range(32)]
    cache = Cache(timelines.decoder.config)
    first = mx.array([[int(sequence[0])] for sequence in timelines.sequences])
    timelines.decoder(first, cache)
    fed = mx.array([[timelines.token(row, 0)] for row in range(32)])
    together = np.array(timelines.decoder(fed, cache))[:, 0]
    expected = np.stack([timelines.alone(row, 1)[0] for row in range(32)])
    assert not np.array_equal(together, expected)
    message = r"tokens: expected one for each of 32 rows, at most 31, got \[32, 1\]"
    with pytest.raises(RequestError, match=message):
        timelines.decoder.step_rows(fed, Rows(rows))


def test_tokens_of_another_shape_are_refused():
    decoder = Decoder.open(EMBEDDED)
    timelines = Timelines(decoder, [4, 5], steps=1)
    rows = Rows([timelines.begun(0), timelines.begun(1)])
    with pytest.raises(
        RequestError, match=r"tokens: expected one for each of 2 rows, at most 31, got \[1, 2\]"
    ):
        decoder.step_rows(mx.array([[1, 2]]), rows)


def swapped(layers):
    """The fault: recurrent states reach the wrong rows."""
    layer = _STACKED(layers)
    if isinstance(layer, RecurrentCache):
        layer.state = layer.state[::-1]
    return layer


def without_conv(layers):
    """The fault: the rows before the convolution are forgotten."""
    layer = _STACKED(layers)
    if isinstance(layer, RecurrentCache):
        layer.conv = mx.zeros_like(layer.conv)
    return layer


def lagging(self, count):
    """The fault: positions stand still."""
    for cache in self.caches:
        cache.torn = False


_STACKED = ragged._stacked


@pytest.mark.parametrize(
    ("where", "fault"),
    [(ragged, swapped), (ragged, without_conv), (Rows, lagging)],
    ids=["states", "conv", "positions"],
)
def test_the_comparison_notices_a_fault(monkeypatch, where, fault):
    monkeypatch.setattr(where, "advance" if where is Rows else "_stacked", fault)
    timelines = Timelines(Decoder.open(EMBEDDED), [5, 60], steps=3)
    with pytest.raises(AssertionError):
        assert_bits(timelines, steps_of(timelines, {0: ([], [0, 1])}, steps=3))


def test_a_row_that_left_goes_on_alone():
    timelines = Timelines(Decoder.open(EMBEDDED), [5, 60, 7], steps=6)
    caches = [timelines.begun(row) for row in range(3)]
    rows = Rows(caches)
    for step in range(3):
        timelines.decoder.step_rows(mx.array([[timelines.token(row, step)] for row in range(3)]), rows)
    rows.leave(caches[1])
    assert [cache.position for cache in caches] == [8, 63, 10]
    for step in range(3, 6):
        logits = timelines.decoder(mx.array([[timelines.token(1, step)]]), caches[1])
    assert np.array_equal(np.array(logits)[0, 0], timelines.alone(1, 6)[-1])


def test_greedy_answers_are_those_alone(model):
    requests = [
        Request(prompt, max_tokens=5 + 2 * index, sampling=GREEDY) for index, prompt in enumerate(PROMPTS)
    ]
    expected = [alone(model, request) for request in requests]
    assert {each.finish_reason for each in expected} == {"stop", "length"}  # rows leave at different times
    for rows in (3, 8):
        vars(model).pop("store")
        done = generate_batch(model, requests, rows=rows)
        assert [same(a, b) for a, b in zip(done, expected, strict=True)] == [True] * len(requests)


MIXED = (
    Request(PROMPTS[0], max_tokens=16, sampling=moelocal.Sampling(temperature=2.0), seed=4),
    Request(PROMPTS[0], max_tokens=16, sampling=moelocal.Sampling(temperature=2.0), seed=5),
    Request(PROMPTS[8], max_tokens=16, sampling=moelocal.Sampling(0, repetition_penalty=1.3), logprobs=3),
    Request(
        PROMPTS[5], max_tokens=16, sampling=moelocal.Sampling(1.5, top_k=5, frequency_penalty=0.5), seed=1
    ),
    Request("The words are: one, two, ", max_tokens=20, sampling=GREEDY, stop=[" "], raw=True, logprobs=0),
    Request(PROMPTS[1], max_tokens=16, seed=9, thinking=False),
    Request(PROMPTS[1], max_tokens=16, seed=9, thinking=True, stop=["apple"]),
    Request([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], seed=3),
    Request(PROMPTS[9], max_tokens=1, sampling=GREEDY),
    Request(PROMPTS[2], max_tokens=16, sampling=moelocal.Sampling(0, logit_bias={300: 100.0})),
)


def test_each_row_has_its_own_settings_seed_and_stops(model):
    expected = [alone(model, request) for request in MIXED]
    vars(model).pop("store")
    done = generate_batch(model, MIXED, rows=4)
    assert [same(a, b) for a, b in zip(done, expected, strict=True)] == [True] * len(MIXED)
    others = generate_batch(model, MIXED[::-1], rows=3)[::-1]
    assert [same(a, b) for a, b in zip(others, expected, strict=True)] == [True] * len(MIXED)
    assert done[0].tokens != done[1].tokens  # the seed counts
    assert set(done[9].tokens) == {300}  # and the bias is of one row
    assert len(done[8].tokens) == 1 and done[8].usage.completion == 1


@settings(max_examples=4)
@given(
    st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(1, 16), st.integers(0, 3)), min_size=1, max_size=5
    ),
    st.integers(1, 4),
)
def test_random_batches_give_the_answers_alone(model, drawn, rows):
    requests = [
        Request(prompt, most, moelocal.Sampling(heat), seed=heat, thinking=bool(heat % 2))
        for prompt, most, heat in drawn
    ]
    done = generate_batch(model, requests, rows=rows)
    each = [moelocal.generate(model, r.prompt, max_tokens=r.max_tokens, sampling=r.sampling, seed=r.seed,
                              thinking=r.thinking) for r in requests]  # fmt: skip
    assert all(same(a, b) for a, b in zip(done, each, strict=True))


def test_events_of_each_row_add_up_to_its_completion(model):
    events: dict[int, list[moelocal.Event]] = {}
    for index, event in stream_batch(model, MIXED[2:7], rows=3):
        events.setdefault(index, []).append(event)
    assert sorted(events) == list(range(5))
    for own in events.values():
        done = own[-1].completion
        assert done is not None and all(event.completion is None for event in own[:-1])
        assert "".join(event.text for event in own) == done.text
        assert "".join(event.reasoning for event in own) == done.reasoning
        assert tuple(token for event in own for token in event.tokens) == done.tokens
        assert 0 < done.timing.first_token_seconds <= done.timing.total_seconds


def test_rows_advance_together_and_the_next_prompt_takes_a_free_place(model):
    endless = moelocal.Sampling(0, logit_bias=dict.fromkeys(model.stop_tokens, -1e9))
    requests = [Request(prompt, max_tokens=4, sampling=endless) for prompt in PROMPTS[:3]]
    order = [index for index, event in stream_batch(model, requests, rows=2) if event.tokens]
    assert order == [0, 1] * 4 + [2] * 4


def test_closing_the_stream_ends_it_and_the_model_answers_on(model):
    stream = stream_batch(model, MIXED, rows=4)
    assert next(stream)[0] == 0
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    request = Request(PROMPTS[0], max_tokens=10, sampling=GREEDY)
    assert same(*generate_batch(model, [request]), alone(model, request))


def poisoned(model, monkeypatch, token: int) -> None:
    """From now on the embedding of `token` is NaN."""
    embed = model.decoder.embed
    monkeypatch.setattr(
        model.decoder, "embed", lambda ids: mx.where((ids == token)[..., None], mx.nan, embed(ids))
    )


def test_nan_logits_end_one_row_and_the_others_are_answered(model, monkeypatch):
    requests = [Request(prompt, max_tokens=30, sampling=GREEDY, raw=True) for prompt in PROMPTS[:4]]
    expected = [alone(model, request) for request in requests]
    others = {token for index, done in enumerate(expected) for token in done.tokens if index != 1}
    others |= {token for prompt in PROMPTS[:4] for token in model.tokenizer.encode(prompt)}
    place, token = next((n, t) for n, t in enumerate(expected[1].tokens[:-1]) if t not in others)
    poisoned(model, monkeypatch, token)
    with pytest.raises(BatchError) as raised:
        generate_batch(model, requests)
    message = (
        f"the logits of token {place + 2} are NaN or infinite: the weights are damaged, or overflow in this dtype; "
        'try dtype="float32"'
    )
    assert str(raised.value) == f"1 of 4 prompts failed; number 1: {message}"
    assert set(raised.value.errors) == {1} and isinstance(raised.value.errors[1], NumericsError)
    done = raised.value.completions
    assert done[1] is None
    assert all(same(done[index], expected[index]) for index in (0, 2, 3))


def test_a_prompt_whose_logits_are_nan_fails_alone_and_a_stream_tells_at_its_end(model, monkeypatch):
    requests = [Request(prompt, max_tokens=5, sampling=GREEDY, raw=True) for prompt in ("Hello", "qqq", "Hi")]
    (odd, *_) = set(model.tokenizer.encode("qqq"))
    expected = [alone(model, request) for request in requests]
    assert all(odd not in done.tokens for done in (expected[0], expected[2]))
    poisoned(model, monkeypatch, odd)
    seen: dict[int, moelocal.Completion] = {}
    with pytest.raises(BatchError, match="1 of 3 prompts failed; number 1: the logits of token 1 are NaN"):
        for index, event in stream_batch(model, requests, rows=1):
            if event.completion:
                seen[index] = event.completion
    assert set(seen) == {0, 2} and all(same(seen[index], expected[index]) for index in seen)


def test_what_shows_at_the_first_token_only_ends_its_row_too(model):
    requests = [
        Request("Hello!", max_tokens=3, sampling=moelocal.Sampling(0, logit_bias={99_999: 1.0})),
        Request("Hello!", max_tokens=3, sampling=GREEDY),
    ]
    with pytest.raises(BatchError) as raised:
        generate_batch(model, requests)
    assert str(raised.value) == (
        "1 of 2 prompts failed; number 0: sampling: logit_bias: expected token ids below 1536, got 99999"
    )
    assert raised.value.completions[0] is None
    assert same(raised.value.completions[1], alone(model, requests[1]))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request(""), RequestError, "prompt 1: the prompt is empty"),
        (Request("Hello", max_tokens=0), RequestError, "prompt 1: max_tokens: expected an integer from 1, got 0"),
        (
            Request("Hello", logprobs=-1),
            RequestError,
            "prompt 1: logprobs: expected an integer from 0, or None, got -1",
        ),
        (Request("", raw=True), RequestError, "prompt 1: prompt: expected at least one token, got an empty text"),
        (Request("Hello", stop="x"), RequestError, "prompt 1: stop: expected a list of strings, got the string 'x'"),
        (Request("Hello", seed="x"), RequestError, "prompt 1: seed: expected an integer or None, got 'x'"),
        (
            Request("word " * 5000, raw=True),
            ContextOverflow,
            r"prompt 1: the prompt has \d+ tokens, the context of embedded 4096; shorten it",
        ),
    ],
)  # fmt: skip
def test_every_prompt_is_checked_before_the_first_is_read(model, monkeypatch, request_, error, message):
    monkeypatch.setattr(module, "_events", lambda *args: iter(()))
    with pytest.raises(error, match=f"^{message}$"):
        stream_batch(model, [Request("fine"), request_])


@pytest.mark.parametrize("rows", [0, 32, True, 2.0])
def test_a_bad_number_of_rows_is_refused(model, rows):
    with pytest.raises(RequestError, match=rf"^rows: expected an integer from 1 to 31, got {rows!r}$"):
        stream_batch(model, [Request("Hello")], rows=rows)


def test_no_prompts_are_refused(model):
    with pytest.raises(RequestError, match=r"^requests: expected at least one prompt, got none$"):
        stream_batch(model, [])


def long_batch(monkeypatch, steps: int, every: int) -> tuple[list[int], list[int], list[int]]:
    """Of a long batched decode, seen every so often: edges of the unevaluated graph behind all live arrays, the number
    of live arrays, active bytes."""
    decoder = Decoder.open(EMBEDDED)
    append = AttentionCache.append

    def windowed(self, stored):
        # attention over a growing cache would dominate the time: all else is the real path
        if self.length >= 64:
            self.length = 32
        return append(self, stored)

    monkeypatch.setattr(AttentionCache, "append", windowed)
    timelines = Timelines(decoder, [3, 20, 9], steps=0)
    rows = Rows([timelines.begun(row) for row in range(3)])
    fed = mx.array([[1], [2], [3]])
    edges, counts, memory = [], [], []
    for step in range(steps):
        fed = mx.argmax(decoder.step_rows(fed, rows)[:, -1], axis=-1, keepdims=True)
        if step % 7 == 3:  # rows come and go, and their states are stacked again
            cache = rows.caches[step % 3]
            rows.leave(cache)
            rows.join(cache)
        if step % every == every - 2:
            gc.collect()
            edges.append(depth(*(each for each in gc.get_objects() if type(each) is mx.array)))
        mx.async_eval(fed)
        if step % every == every - 1:
            mx.eval(fed, [cache.arrays for cache in rows.apart()])
            counts.append(live_arrays())
            memory.append(mx.get_active_memory())
    gc.collect()
    return edges, counts, memory


def assert_flat(seen: tuple[list[int], list[int], list[int]]) -> None:
    edges, counts, memory = seen
    assert len(edges) > 2 and len(set(edges[1:])) == 1, edges
    assert len(set(counts[1:])) == 1, counts
    assert max(memory[1:]) - min(memory[1:]) < 1 << 20, memory


def test_a_batch_leaves_nothing_behind_but_keys_and_values(monkeypatch):
    assert_flat(long_batch(monkeypatch, steps=112, every=28))


def test_a_chain_of_bookkeeping_would_be_noticed(monkeypatch):
    chain, advance = [mx.array(0)], Rows.advance

    def counting(self, count):
        chain[0] = chain[0] + count  # never evaluated: a buffer a step
        advance(self, count)

    monkeypatch.setattr(Rows, "advance", counting)
    with pytest.raises(AssertionError):
        assert_flat(long_batch(monkeypatch, steps=84, every=28))


@pytest.mark.slow
def test_20000_steps_of_a_batch_hold_live_arrays_and_graph_depth_flat(monkeypatch):
    assert_flat(long_batch(monkeypatch, steps=20_000, every=2_100))


def test_generate_takes_a_list_of_prompts(model):
    greedy = moelocal.Sampling(temperature=0)
    prompts = ["Hello!", "What is 12 + 7?", "Sort these words: pear, apple, fig"]
    together = moelocal.generate(model, prompts, sampling=greedy, max_tokens=20)
    alone = [moelocal.generate(model, prompt, sampling=greedy, max_tokens=20) for prompt in prompts]
    assert [done.tokens for done in together] == [done.tokens for done in alone]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    again = moelocal.generate(model, chats, sampling=greedy, max_tokens=20)
    assert [done.tokens for done in again] == [done.tokens for done in alone]


def test_a_list_of_requests_has_settings_for_each(model):
    requests = [
        moelocal.Request("Hello!", seed=1, max_tokens=12),
        moelocal.Request("Hello!", seed=2, sampling=moelocal.Sampling(temperature=1.5), max_tokens=30),
        moelocal.Request("Once upon", raw=True, max_tokens=5, seed=3, logprobs=2),
    ]
    together = moelocal.generate(model, requests)
    for request, done in zip(requests, together, strict=True):
        settings = {
            name: getattr(request, name) for name in ("seed", "sampling", "max_tokens", "raw", "logprobs")
        }
        assert moelocal.generate(model, request.prompt, **settings).tokens == done.tokens
    assert together[2].logprobs is not None and together[0].logprobs is None
    with pytest.raises(RequestError) as caught:
        moelocal.generate(model, requests, seed=3)
    assert (
        str(caught.value)
        == "seed: a Request has settings of its own; name it there, not beside a list of them"
    )


def test_a_session_takes_one_prompt(model):
    with pytest.raises(
        RequestError, match="prompt: a session takes one prompt, got a list of them; pass the model"
    ):
        moelocal.generate(model.session(), ["a", "b"])
