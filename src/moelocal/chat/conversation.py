"""What a chat keeps: its messages, and their way to files and back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelocal.errors import RequestError
from moelocal.whole import write_whole

FORMAT = "moelocal-chat"
VERSION = 1
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """`messages`: the turns, without the system message. `thinking`: None leaves it to the chat template."""

    system: str | None = None
    thinking: bool | None = None
    messages: list[Message] = field(default_factory=list)

    def prompt(self) -> list[Message]:
        """The messages as a model is given them."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.messages

    def last_svg(self) -> str | None:
        """The last complete SVG of the latest answer that holds one, fit to be a file of its own."""
        for message in reversed(self.messages):
            if message["role"] == "assistant" and (found := _svgs(message["content"])):
                return found[-1]
        return None


def save(path: Path, conversation: Conversation, model: str) -> None:
    """Writes the conversation as JSON. Either the whole file is there afterwards, or what was there before.

    Raises RequestError where the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "thinking": conversation.thinking,
        "system": conversation.system,
        "messages": conversation.messages,
    }
    write_whole(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode(), private=True)


def load(path: Path) -> tuple[Conversation, str]:
    """The conversation in a file that `save` wrote, and the name of the model that it was held with.

    Raises RequestError where the file cannot be read or is something else.
    """
    try:
        content = json.loads(path.read_bytes())
        json.dumps(content, ensure_ascii=False).encode()  # refuses half of a surrogate pair, which is no text
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: expected JSON in UTF-8: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RequestError(f'{path}: expected a chat saved with /save ("format": "{FORMAT}")')
    if content.get("version") != VERSION:
        raise RequestError(f"{path}: version: expected {VERSION}, got {content.get('version')!r}")
    _expect(path, "model", content.get("model"), str, "a string")
    _expect(path, "system", content.get("system"), (str, type(None)), "a string or null")
    _expect(path, "thinking", content.get("thinking"), (bool, type(None)), "true, false or null")
    _expect(path, "messages", content.get("messages"), list, "a list")
    for index, message in enumerate(content["messages"]):
        where = f"messages[{index}]"
        _expect(path, where, message, dict, "an object")
        if message.get("role") not in ROLES:
            raise RequestError(
                f"{path}: {where}.role: expected one of {', '.join(ROLES)}, got {message.get('role')!r}"
            )
        _expect(path, f"{where}.content", message.get("content"), str, "a string")
        _expect(path, f"{where}.reasoning_content", message.get("reasoning_content", ""), str, "a string")
        _expect(path, f"{where}.tool_calls", message.get("tool_calls", []), list, "a list")
    return Conversation(content["system"], content["thinking"], content["messages"]), content["model"]


def _expect(path: Path, where: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        raise RequestError(f"{path}: {where}: expected {expected}, got {type(value).__name__}")


def _svgs(text: str) -> list[str]:
    """The outermost `<svg …>…</svg>` of a text."""
    found, depth, start = [], 0, 0
    for tag in re.finditer(r"<svg(?=[\s>])|</svg\s*>", text):
        if not tag[0].startswith("</"):
            start = tag.start() if depth == 0 else start
            depth += 1
        elif depth > 0:
            depth -= 1
            if depth == 0:
                found.append(_standalone(text[start : tag.end()]))
    return found


def _standalone(svg: str) -> str:
    """An SVG inside a web page needs no namespace; viewers refuse a file without one."""
    opening = svg[: svg.index(">")]
    if "xmlns=" not in opening:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return svg + "\n"
