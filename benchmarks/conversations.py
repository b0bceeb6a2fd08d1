"""12 conversations as agents and people have them: how much of each prompt is reused, of what could be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import moelocal
from moelocal.cache import Disk, Store
from moelocal.engine.chunks import boundaries
from moelocal.engine.load import Model
from moelocal.engine.reuse import common
from moelocal.engine.session import Session
from moelocal.text.messages import prepare, prepare_tools

GREEDY = moelocal.Sampling(temperature=0)
FILLER = "The quick brown fox jumps over the lazy dog, counts 1 to 9, and goes home again. "
STOPS = ("a", "e", "i", "o", "u", "n", "s", "t", "1", "2", ">", "}")
"""Strings that end the answers here: over a text this long the embedded model never comes to an end of its own."""

Messages = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def fresh(model: Model, disk: Disk | None = None) -> Model:
    """The same network and texts with nothing stored."""
    other = Model(model.decoder, model.folder, model.name)
    other.tokenizer, other.template = model.tokenizer, model.template
    other.store = Store(model.store.fingerprint, model.store.budget, disk)
    return other


@dataclass(frozen=True)
class Script:
    """What is asked, one prompt after the other. `answers`: the messages so far -> those of the next prompt."""

    name: str
    prompts: Sequence[Callable[[Messages], Messages]]
    tools: Sequence[dict[str, Any]] | None = None
    thinking: bool | None = None


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {each: {"type": "string"} for each in parameters}
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {
        "type": "function",
        "function": {**function, "description": f"Calls {name} and gives its output."},
    }


TOOLS = [tool("weather", "city"), tool("read_file", "path"), tool("run", "command", "folder")]
LONG = "You work in a repository. " + " ".join(f"Rule {i}: {FILLER}" for i in range(40))


def say(text: str) -> Callable[[Messages], Messages]:
    return lambda before: [*before, user(text)]


def result(text: str) -> Callable[[Messages], Messages]:
    """The output of a tool that the last answer called, whether the model did so or not."""

    def added(before: Messages) -> Messages:
        call = {"name": "run", "arguments": {"command": "ls"}}
        last = before[-1] if before[-1].get("tool_calls") else {**before[-1], "tool_calls": [call]}
        return [*before[:-1], last, {"role": "tool", "content": text}]

    return added


def scripts() -> list[Script]:
    """12 conversations."""
    chat = [say("My name is Ada."), say("What is my name?"), say("Sort: pear, apple, fig"), say("Thanks!")]
    loop = [
        say("What is the weather in Oslo?"),
        *[result(f"{i} degrees") for i in range(4)],
        say("And in Rome?"),
        result("21"),
    ]

    def begin(text: str) -> Callable[[Messages], Messages]:
        return lambda before: [system(text)]

    def edited(before: Messages) -> Messages:
        last = max(i for i, m in enumerate(before) if m["role"] == "user")
        return [*before[:last], user("What is 30 + 4?")]

    def again(before: Messages) -> Messages:
        return before[:-1]

    def tail(before: Messages) -> Messages:
        return [*before[:-3], user("Another question: what is 3 + 9?"), assistant("12"), user("Why?")]

    def other(text: str) -> Callable[[Messages], Messages]:
        return lambda before: [before[0], user(text)]

    held: list[Messages] = []

    def keep(step: Callable[[Messages], Messages]) -> Callable[[Messages], Messages]:
        """The same step, of the conversation that was left for another one."""

        def back(before: Messages) -> Messages:
            held.append(before)
            return step(held[-2]) if len(held) > 1 else step(before)

        return back

    long = [system(LONG)]
    return [
        Script("plain chat", chat, thinking=False),
        Script("thinking, stripped", chat, thinking=True),
        Script("system prompt", [lambda b: [system("Be brief."), user("Hello!")], *chat], thinking=False),
        Script("tool loop", loop, TOOLS, False),
        Script("tool loop, thinking", loop, TOOLS, True),
        Script("long system prompt, tools", [lambda b: [*long, user("Hello!")], *loop], TOOLS),
        Script("last message edited", [*chat[:2], edited, *chat[2:]], thinking=False),
        Script("edited, thinking", [*chat[:2], edited, edited, chat[3]], thinking=True),
        Script("answered again", [*chat[:3], again, again, chat[3]]),
        Script("tail changed", [*chat, tail, say("And 4 + 4?"), tail], thinking=False),
        Script(
            "two in turns",
            [
                lambda b: [*long, user("Hello!")],
                keep(other("What is 1 + 1?")),
                keep(chat[0]),
                keep(chat[1]),
                keep(chat[2]),
            ],
        ),
        Script(
            "same system, new task", [lambda b: [*long, *b, user("Hello!")], other("List."), other("Go.")]
        ),
    ]


def hits(model: Model) -> list[tuple[str, str, int, int]]:
    """Name, way, tokens reused, tokens that could be, of every conversation."""
    found = []
    for way in ("session", "plain"):
        for script in scripts():
            other = fresh(model)
            source: Model | Session = other.session() if way == "session" else other
            found.append((script.name, way, *played(other, source, script)))
    return found


def played(model: Model, source: Model | Session, script: Script) -> tuple[int, int]:
    """Tokens reused, and those that could be."""
    rendered: list[list[int]] = []
    messages: Messages = []
    reused = best = 0
    for step in script.prompts:
        messages = step(messages)
        text = model.template.render(
            prepare(messages), tools=prepare_tools(script.tools), thinking=script.thinking
        )
        prompt = model.tokenizer.encode(text)
        shared = max((common(before, prompt) for before in rendered), default=0)
        possible = max((b for b in boundaries(prompt, model.message_start) if b <= shared), default=0)
        done = moelocal.generate(
            source,
            messages,
            sampling=GREEDY,
            max_tokens=200,
            tools=script.tools,
            thinking=script.thinking,
            stop=STOPS[-3:],
        )
        reused, best = reused + min(done.usage.cached, possible), best + possible
        rendered.append(prompt)
        if isinstance(source, Session):
            rendered.append(source.tokens)
        messages = [*messages, assistant(done.text, tool_calls=done.tool_calls)]
        if done.reasoning:
            messages[-1]["reasoning_content"] = done.reasoning
    return reused, best
