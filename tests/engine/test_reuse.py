"""Why less was reused than could be: the cause is what a person did, and nothing is called so that they did not do."""

from __future__ import annotations

import pytest

import moelocal
from moelocal.engine.reuse import explain

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def model() -> moelocal.Model:
    return moelocal.load()


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def tokens(model, messages, **options):
    return model.tokenizer.encode(model.template.render(messages, **options))


def miss(model, before, now, cached=0, evicted=False):
    return explain(before, now, cached, lambda shared: evicted, model.tokenizer, model.message_start)


def cause(model, before, now):
    found = miss(model, before, now)
    return found and found.cause


def test_an_edited_message_of_the_user_that_mentions_a_tag_is_edited(model):
    rest = [{"role": "assistant", "content": "ok"}, user("go")]
    before = tokens(model, [user("explain <think> tags"), *rest])
    now = tokens(model, [user("explain those tags"), *rest])
    assert cause(model, before, now) == "edited"


def test_dropped_reasoning_is_the_assistants(model):
    before = tokens(model, [user("Hi")]) + model.tokenizer.encode("hm\n</think>\n\nHello<|im_end|>\n")
    now = tokens(model, [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Go")])
    assert cause(model, before, now) == "reasoning dropped"
    now = tokens(model, [user("Hi"), {"role": "assistant", "content": "Bye"}, user("Go")])
    assert cause(model, before, now) == "reasoning dropped"


def test_an_answer_in_other_tokens_is_not_called_edited(model):
    head = tokens(model, [user("Hi")], thinking=False)
    answer = [token for letter in "Hello" for token in model.tokenizer.encode(letter)]
    end = model.tokenizer.encode("<|im_end|>\n")
    now = [*head, *model.tokenizer.encode("Hello"), *end, *tokens(model, [user("Go")])]
    assert cause(model, [*head, *answer, *end], now) == "answer rendered anew"


@pytest.mark.parametrize("thinking", [True, False])
def test_another_answer_to_the_same_messages_misses_nothing(model, thinking):
    asked = [system("Be brief."), user("Hi")]
    now = tokens(model, asked, thinking=thinking)
    opened = max(i for i, token in enumerate(now) if token == model.message_start)
    for before in (
        now,
        tokens(model, asked, thinking=True),
        tokens(model, asked, thinking=True) + model.tokenizer.encode("hm\n</think>\n\nHello<|im_end|>\n"),
        tokens(model, [*asked, {"role": "assistant", "content": "Hello"}, user("More")]),
    ):
        assert miss(model, before, now, cached=opened) is None
        # but that its beginning had to go is said
        found = miss(model, before, now, cached=5, evicted=True)
        assert (found.cause, found.position) == ("evicted", 5)


def test_a_generated_answer_again_in_a_session(model):
    session = model.session()
    for thinking in (None, None, True, False, None):
        done = moelocal.generate(session, [user("Hi you there")], max_tokens=40, seed=1, thinking=thinking)
        assert done.usage.miss is None


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (("Be brief.", [TOOL]), ("Be brief.", [OTHER]), "tools changed"),
        (("Be brief.", [TOOL]), ("Be brief.", [TOOL, OTHER]), "tools changed"),
        (("Be brief.", None), ("Be brief.", [TOOL]), "tools changed"),
        (("Be brief.", [TOOL]), ("Be brief.", None), "tools changed"),
        (("Be brief.", [TOOL]), ("Be long.", [OTHER]), "system prompt changed"),
        (("Be brief.", None), ("Be long.", [TOOL]), "system prompt changed"),
        (("Be brief.", [TOOL]), ("Be long.", None), "system prompt changed"),
        (("Be brief.", None), ("Be long.", None), "system prompt changed"),
        (("Be brief.\nIt is 9:59 AM.", None), ("Be brief.\nIt is 10:00 AM.", None), "volatile"),
        (("Step 9", [TOOL]), ("Step 10", [TOOL]), "volatile"),
        (("It is Monday. Be brief.", None), ("It is Friday. Be brief.", None), "volatile"),
        (("Step 9\nDay 3", None), ("Step 10\nDay 4", None), "system prompt changed"),
        (("Step 9", None), ("Step 10\nMore", None), "system prompt changed"),
        (("Step 9", [TOOL]), ("Step 10", [OTHER]), "system prompt changed"),
    ],
)
def test_what_changed_before_the_first_message(model, before, now, expected):
    old, new = (tokens(model, [system(text), user("Hi")], tools=tools) for text, tools in (before, now))
    whole = "volatile line in the system prompt" if expected == "volatile" else expected
    assert cause(model, old, new) == whole


def test_a_volatile_line_is_shown_whole(model):
    texts = [
        f"You help people who ask about many things.\nIt is {time}, as far as we know.\nBe brief."
        for time in "89"
    ]
    found = miss(model, *(tokens(model, [system(text), user("Hi")]) for text in texts))
    assert (found.before, found.now) == tuple(f"It is {time}, as far as we know." for time in "89")


def test_a_system_prompt_put_before_is_a_change_of_it(model):
    now = tokens(model, [system("New rule."), user("Hi")])
    assert cause(model, tokens(model, [user("Hi")]), now) == "system prompt changed"
