"""What kind of task a call was, by a short table of rules. The first that holds decides.

The rules look at words, in English, and at fields of the request; they are a sorting aid, not a judgement. "other" is
what no rule holds for, "not recorded" what came without its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moelocal.cost.shapes import Entry

NOT_RECORDED: Final = "not recorded"
OTHER: Final = "other"
_LOOKED_AT: Final = 2_000
"""Characters at either end of a text: instructions stand there, and a document of a megabyte is not searched."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the rules see: `asked`: the last user message, `told`: the system message, both cut in the middle;
    `turns`: of the user; the rest as in `Entry` and `Prompt`."""

    asked: str
    told: str
    turns: int
    tools: bool
    wants_json: bool
    embedding: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """`kind` if `holds`; `why` in words, for the documentation."""

    kind: str
    why: str
    holds: Callable[[Task], bool]


def _words(pattern: str) -> Callable[[Task], bool]:
    """Whether the pattern is in what was asked, or else in what the system message told."""
    found = re.compile(pattern, re.IGNORECASE)
    return lambda task: bool(found.search(task.asked) or found.search(task.told))


def _asked(pattern: str) -> Callable[[Task], bool]:
    found = re.compile(pattern, re.IGNORECASE)
    return lambda task: bool(found.search(task.asked))


_CODE: Final = (
    r"```|\b(def|class|function|import|const|public|#include)\s+\w+.{0,80}[:({;]|\b(traceback|stack ?trace|refactor|"
    r"debug|unit tests?|regex|sql query|shell script|bash|compile[rs]?|pull request)\b|"
    r"\b(write|fix|review|explain|implement|port)\b.{0,40}\b(code|function|class|script|program|query|method|bug)\b|"
    r"\b(in|using) (python|javascript|typescript|rust|java|c\+\+|swift|kotlin|golang|sql)\b"
)
_EXTRACTION: Final = (
    r"\b(extract|parse|fill in the schema|structured data|as (valid )?json|in json|json (object|array|schema|format)|"
    r"named entit|key[- ]value|as csv|return only (a |the )?json)"
)
_CLASSIFICATION: Final = (
    r"\b(classif(y|ication)|categori[sz]e|sentiment|label (the|this|each)|which (category|label)|spam or|"
    r"moderat(e|ion)|rate (the|this) .{0,30}\b(from|on a scale))"
)
_SUMMARY: Final = (
    r"\b(summar(y|ies|i[sz]e|i[sz]ation)|tl;?dr|key points|in (one|two|three|\d+) sentences|"
    r"condense|digest of)\b"
)
_TRANSLATION: Final = (
    r"\b(translat(e|ing|or|ion (of|to|into|from))|(into|to|from) (english|german|french|spanish|italian|portuguese|"
    r"dutch|polish|russian|chinese|japanese|korean|arabic|hindi|turkish|ukrainian)\b)"
)
_WRITING: Final = (
    r"\b(write|draft|compose|rewrite|rephrase|proofread|improve|edit)\b.{0,60}\b(e-?mail|letter|essay|article|post|story|"
    r"poem|blog|text|paragraph|speech|description|slogan|headline|reply|cover letter|tweet|newsletter)\b"
)
_QUESTION: Final = re.compile(
    r"\?\s*$|^\s*(what|who|whom|whose|when|where|why|how|which|is|are|was|were|do|does|did|can|could|should|would|will)\b"
    r"|\b(answer the question|based on the (context|document|passage))\b",
    re.IGNORECASE,
)
_GREETING: Final = re.compile(r"\s*(hi|hello|hey|thanks|thank you)\b", re.IGNORECASE)

RULES: Final = (
    Rule("embedding", "an embeddings call", lambda task: task.embedding),
    Rule("tool use", "tools are offered or called", lambda task: task.tools),
    Rule("extraction", "the request asks the API for JSON", lambda task: task.wants_json),
    Rule("translation", "words such as translate, into German", _asked(_TRANSLATION)),
    Rule("summarising", "words such as summarise, key points, TL;DR", _words(_SUMMARY)),
    Rule("classification", "words such as classify, sentiment, label this", _words(_CLASSIFICATION)),
    Rule("extraction", "words such as extract, as JSON, named entities", _words(_EXTRACTION)),
    Rule("code", "a code block, code itself, words such as refactor, traceback", _words(_CODE)),
    Rule("writing", "words such as draft an e-mail, rewrite this text", _asked(_WRITING)),
    Rule("translation", "the system message says translate", _words(_TRANSLATION)),
    Rule("question answering", "one turn that ends in ? or begins like a question",
         lambda task: task.turns == 1 and _QUESTION.search(task.asked) is not None),
    Rule("chat", "several turns of the user, or a greeting",
         lambda task: task.turns > 1 or _GREETING.match(task.asked) is not None),
)  # fmt: skip

KINDS: Final = (*dict.fromkeys(rule.kind for rule in RULES), OTHER, NOT_RECORDED)


def kind_of(entry: Entry) -> str:
    """The kind of a call."""
    prompt = entry.prompt
    tools = entry.tool_calls or bool(prompt and prompt.tools)
    if prompt is None and not (tools or entry.embedding):
        return NOT_RECORDED
    messages = prompt.messages if prompt else ()
    asked = [text for role, text in messages if role == "user"]
    told = [text for role, text in messages if role == "system"]
    task = Task(
        _ends(asked[-1]) if asked else "",
        _ends(told[0]) if told else "",
        len(asked),
        tools,
        bool(prompt and prompt.wants_json),
        entry.embedding,
    )
    return next((rule.kind for rule in RULES if rule.holds(task)), OTHER)


def _ends(text: str) -> str:
    return text if len(text) <= 2 * _LOOKED_AT else f"{text[:_LOOKED_AT]}\n{text[-_LOOKED_AT:]}"
