"""Chat templates: the golden renderings byte for byte, where templates are found, what they may not do."""

from __future__ import annotations

import json
import re
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pytest

from moelocal.errors import TemplateError
from moelocal.text.template import ChatTemplate

GOLDEN_TEMPLATES = (
    "qwen3.6_chat_template",
    "qwen3.5_chat_template",
    "qwen3.5_small_0.8b_2b_chat_template",
    "qwen3-coder-next_chat_template",
    "qwen3-coder_6211B_5a38bfa0",
)


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


# The inputs of goldens.json, as reference/model.md section 3 lists them.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <now>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City & country"},
                    "days": {"type": "integer"},
                    "opts": {"type": "object"},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "reasoning_content": "need weather",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "c1",
            "function": {
                "name": "get_weather",
                "arguments": {"city": "Paris", "days": 2, "opts": {"a": True}, "flag": True},
            },
        }
    ],
}
SUNNY = {"role": "tool", "content": "sunny"}
GREETED = {"role": "assistant", "reasoning_content": "greet", "content": "Hello"}
MULTI_TURN = [user("Hi"), GREETED, user("Again")]
INLINE = {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nHello"}
AFTER_ROUND = {"role": "assistant", "reasoning_content": "done", "content": "Sunny."}
STRING_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}],
}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([user("Hi")], {}),
    "system": ([{"role": "system", "content": "Be brief."}, user("Hi")], {}),
    "no_think": ([user("Hi")], {"thinking": False}),
    "think_true": ([user("Hi")], {"thinking": True}),
    "multi_turn": (MULTI_TURN, {}),
    "multi_turn_preserve": (MULTI_TURN, {"preserve_thinking": True}),
    "multi_turn_inline_think": ([user("Hi"), INLINE, user("Again")], {"preserve_thinking": True}),
    "tools": ([user("Weather?")], {"tools": TOOLS}),
    "tool_round": ([user("Weather?"), CALL, SUNNY, {"role": "tool", "content": "warm"}], {"tools": TOOLS}),
    "tool_round_then_user": (
        [user("Weather?"), CALL, SUNNY, AFTER_ROUND, user("Thanks")],
        {"tools": TOOLS},
    ),
    "image": ([user([{"type": "image", "image": "x"}, {"type": "text", "text": "What?"}])], {}),
    "two_systems": (
        [{"role": "system", "content": "a"}, user("x"), {"role": "system", "content": "b"}],
        {},
    ),
    "developer_role": ([{"role": "developer", "content": "a"}, user("x")], {}),
    "args_as_json_string": ([user("Weather?"), STRING_CALL], {"add_generation_prompt": False}),
    "only_assistant": ([{"role": "assistant", "content": "x"}], {}),
}
WRONG = "tools_with_jinja2_builtin_tojson_WRONG"


@pytest.fixture(scope="session")
def goldens(templates: Path) -> dict[str, dict[str, str]]:
    content: dict[str, dict[str, str]] = json.loads((templates / "goldens.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GOLDEN_TEMPLATES)
def test_golden(templates: Path, goldens: dict[str, dict[str, str]], name: str, case: str) -> None:
    template = ChatTemplate((templates / f"{name}.jinja").read_text(encoding="utf-8"))
    messages, arguments = CASES[case]
    expected = goldens[name][case]
    if not expected.startswith("!!"):
        assert template.render(messages, **arguments) == expected
        return
    message = expected.removeprefix("!! ").removeprefix("TemplateError: ")
    with pytest.raises(TemplateError, match=f"^{re.escape(f'the chat template failed: {message}')}$"):
        template.render(messages, **arguments)


@pytest.mark.parametrize("name", GOLDEN_TEMPLATES)
def test_every_golden_is_used(goldens: dict[str, dict[str, str]], name: str) -> None:
    assert set(goldens) == set(GOLDEN_TEMPLATES)
    assert set(goldens[name]) == {*CASES, WRONG}


@pytest.mark.parametrize("name", GOLDEN_TEMPLATES)
def test_golden_of_the_wrong_tojson_differs(
    templates: Path, goldens: dict[str, dict[str, str]], name: str
) -> None:
    template = ChatTemplate((templates / f"{name}.jinja").read_text(encoding="utf-8"))
    rendered = template.render([user("Weather?")], tools=TOOLS)
    assert (rendered != goldens[name][WRONG]) == name.startswith(("qwen3.5", "qwen3.6"))


EMBEDDED = Path(str(files("moelocal"))) / "embedded" / "chat_template.jinja"


@pytest.mark.skipif(not EMBEDDED.is_file(), reason="the embedded model is not in this checkout")
@pytest.mark.parametrize("case", CASES)
def test_the_embedded_template_renders_the_same(goldens: dict[str, dict[str, str]], case: str) -> None:
    """As Qwen3.6; the wording of an error is its own."""
    template = ChatTemplate(EMBEDDED.read_text(encoding="utf-8"))
    messages, arguments = CASES[case]
    expected = goldens["qwen3.6_chat_template"][case]
    if not expected.startswith("!!"):
        assert template.render(messages, **arguments) == expected
        return
    with pytest.raises(TemplateError, match=r"^the chat template failed: "):
        template.render(messages, **arguments)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GOLDEN_TEMPLATES)
def test_same_as_transformers(templates: Path, name: str, case: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    messages, arguments = CASES[case]
    given = {"add_generation_prompt": True, **arguments}
    if "thinking" in given:
        given["enable_thinking"] = given.pop("thinking")
    try:
        (expected,), _ = render_jinja_template([messages], chat_template=source, **given)
    except (jinja2.TemplateError, TypeError):
        with pytest.raises(TemplateError):
            ChatTemplate(source).render(messages, **arguments)
        return
    assert ChatTemplate(source).render(messages, **arguments) == expected


def test_thinking_is_left_to_the_template_unless_given() -> None:
    template = ChatTemplate("{{ enable_thinking is defined }} {{ enable_thinking }}")
    assert template.render([user("Hi")]) == "False "
    assert template.render([user("Hi")], thinking=True) == "True True"
    assert template.render([user("Hi")], thinking=False) == "True False"


def test_environment() -> None:
    template = ChatTemplate(
        "  {% for n in range(9) %}\n{% if n == 1 %}{% continue %}{% endif %}"
        "{% if n == 3 %}{% break %}{% endif %}{{ n }}{% endfor %}\n"
        "{% generation %}{{ {'b': 'é<&', 'a': 1} | tojson }}{% endgeneration %}\n"
        "{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true, separators=(',', ':')) }}"
        "{% set n = namespace(self=3) %}{% set n.x = 4 %}{{ n.self + n.x }}{{ dict(a=1) }}"
    )
    assert template.render([]) == '02{"b": "é<&", "a": 1}{\n "a":[\n  2\n ],\n "b":1\n}7{\'a\': 1}'


def test_the_date() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    rendered = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([])
    assert rendered in (before, datetime.now().strftime("%Y-%m-%d"))


def test_messages_stay_as_they_are() -> None:
    messages = [user("Hi")]
    with pytest.raises(TemplateError, match="the chat template failed: "):
        ChatTemplate("{{ messages.append(1) }}").render(messages)
    with pytest.raises(TemplateError, match="the chat template failed: "):
        ChatTemplate("{{ messages[0].update(a=1) }}").render(messages)
    assert messages == [user("Hi")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only text, please.') }}", "Only text, please."),
        ("{{ nothing.attribute }}", "'nothing' is undefined"),
        ("{{ messages.nothing() }}", "'list object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ namespace(__class__=1) }}", "a namespace cannot have the attribute '__class__'"),
        ("{% include 'x' %}", "TypeError: no loader for this environment specified"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{{ raise_exception | tojson }}", "TypeError: Object of type function is not JSON serializable"),
        ("{{ range(10**9) | length }}", None),
    ],
)
def test_errors_inside_the_template(source: str, message: str | None) -> None:
    with pytest.raises(TemplateError, match=r"^the chat template failed: ") as caught:
        ChatTemplate(source).render([user("Hi")])
    if message is not None:
        assert str(caught.value) == f"the chat template failed: {message}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression, got 'end of statement block'"),
        ("{% break %}", "SyntaxError: 'break' outside loop ("),
        ("{{ " + "(" * 10_000, "it is nested too deeply"),
    ],
)
def test_no_compile(source: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source)
    assert str(caught.value).startswith(f"the chat template does not compile: {message}")


# Where a template is found


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_order_of_files(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    assert ChatTemplate.open(tmp_path).render([]) == "config"
    write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert ChatTemplate.open(tmp_path).render([]) == "json"
    write(tmp_path, "chat_template.jinja", "jinja")
    assert ChatTemplate.open(tmp_path).render([]) == "jinja"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for content in (named, {entry["name"]: entry["template"] for entry in named}):
        write(tmp_path, "tokenizer_config.json", {"chat_template": content})
        template = ChatTemplate.open(tmp_path)
        assert template.render([]) == "plain"
        assert template.render([], tools=TOOLS) == "tools"
        assert template.source == "plain"


def test_special_tokens_are_variables(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.jinja", "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}")
    write(
        tmp_path,
        "tokenizer_config.json",
        {"eos_token": {"content": "<e>"}, "pad_token": "<p>", "unk_token": None},
    )
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<b>", "pad_token": "<other>"})
    assert ChatTemplate.open(tmp_path).render([]) == "<b>|<e>|<p>|"
    assert ChatTemplate.open(tmp_path).render([], bos_token="<own>") == "<own>|<e>|<p>|"


def test_no_template(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {})
    with pytest.raises(TemplateError) as caught:
        ChatTemplate.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; "
        "add the template of the original model, or pass plain text to continue (raw=True)"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not readable as JSON"),
        ("tokenizer_config.json", [], "expected a JSON object, found list"),
        ("chat_template.json", "", "not readable as JSON"),
        ("special_tokens_map.json", "3", "expected a JSON object, found int"),
        (
            "tokenizer_config.json",
            {"chat_template": 3},
            "chat_template is neither a string nor a list of named templates",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default"}]},
            "chat_template is neither a string nor a list of named templates",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "no chat template named 'default', found ['rag']",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(TemplateError, match=re.escape(f"{path}: {message}")):
        ChatTemplate.open(tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TemplateError, match=re.escape(f"{path}: not readable as UTF-8 text (")):
        ChatTemplate.open(tmp_path)
