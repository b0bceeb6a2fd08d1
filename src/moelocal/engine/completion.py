"""What a generation gives back: the parts of a stream (`Event`) and its sum (`Completion`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moelocal.engine.reuse import Miss
from moelocal.text.tool_calls import ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one sampled token, and of the likeliest alternatives at its position.

    Taken from the distribution of the model itself: float32 log-softmax of the raw logits, before penalties,
    temperature and truncation.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted: `prompt` as rendered, `cached` of them not evaluated again, `completion` sampled. `miss` says why
    not more was cached, where a timeline before this one had more in common with the prompt, or differs from it."""

    prompt: int
    completion: int
    cached: int = 0
    miss: Miss | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds and rates of one generation. Rates are 0.0 where nothing was measured.

    `first_token_seconds`: from the call to the first sampled token. `prefill_tokens_per_second`: evaluated prompt
    tokens over that time. `decode_tokens_per_second`: tokens after the first over the time they took.
    `peak_memory_nbytes`: the highest number of bytes that MLX held during the call.
    """

    first_token_seconds: float
    total_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_nbytes: int


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a stream. Fields that do not apply are empty.

    `text`: new text of the answer; `reasoning`: new text of the thinking part; `tool_calls`: calls completed by this
    step; `tokens`: ids sampled in this step. The last event alone has `completion`, the sum of the whole stream.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[int, ...] = ()
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer. `text` excludes the thinking part, the tool calls and the stop string or token.

    `tokens` are all sampled ids, the stop token included. `finish_reason`: "stop" (stop token or stop string),
    "length" (max_tokens or the end of the context), "tool_calls" (stopped, with at least one complete call).
    `logprobs` has one entry per token when they were asked for.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    logprobs: tuple[TokenLogprob, ...] | None = None
