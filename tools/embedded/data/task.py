"""`Sample`: one conversation whose last turn is judged, and the split into training and held-out instances."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

HELD_OUT = 12
"""One instance in this many is held out."""


@dataclass(frozen=True)
class Sample:
    """`messages` end with the assistant's answer. `instance` is what makes two samples the same task: its hash
    decides the split, so that a phrasing never carries a held-out task into training."""

    skill: str
    messages: list[dict[str, Any]]
    instance: str
    thinking: bool = True
    tools: list[dict[str, Any]] | None = None
    reference: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> bool:
        return is_held_out(self.skill, self.instance)


def is_held_out(skill: str, instance: str) -> bool:
    digest = hashlib.sha256(f"{skill}/{instance}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT == 0


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, thought: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "reasoning_content": thought, "content": content}
    if calls:
        message["tool_calls"] = calls
    return message
