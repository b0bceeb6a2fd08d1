"""Every error that a user, a file or a client can cause. All derive from `MoelocalError`.

A message says where, what was expected, what was found and what to do; the command line prints it as one line
and exits with 1. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class MoelocalError(Exception):
    """Base of all errors raised by this library."""


class ConfigError(MoelocalError):
    """A config file is missing, is not what it claims to be, or holds a value that no supported model has."""


class UnsupportedModel(ConfigError):
    """The checkpoint is well formed, but its architecture (or an option of it) is not one that we run."""


class CheckpointError(MoelocalError):
    """A weight file is missing, cut off, malformed, or holds tensors of another name, shape or dtype."""


class ModelNotFound(MoelocalError):
    """No folder and no reachable repository answers to the name of a model."""


class TokenizerError(MoelocalError):
    """A tokenizer file is missing or unreadable, or a text cannot be encoded."""


class TemplateError(MoelocalError):
    """A chat template is missing, does not compile, or raised while it rendered the messages."""


class RequestError(MoelocalError):
    """The caller asked for something impossible: a bad sampling value, an empty prompt, a malformed message."""


class ContextOverflow(RequestError):
    """The prompt and the tokens asked for do not fit into the context of the model."""


class MemoryOverflow(RequestError):
    """The model, its state for so many tokens and the work on them do not fit into the memory of the machine."""


class NumericsError(MoelocalError):
    """The model produced NaN or infinite logits, or a kernel differs from its reference."""


class BatchError(MoelocalError):
    """Some prompts of a batch failed while they were answered; it is raised after all others are done.

    `errors`: by the number of the prompt, from 0. `completions`: one per prompt, None where it failed; empty if the
    answers were streamed.
    """

    def __init__(self, count: int, errors: Mapping[int, MoelocalError]) -> None:
        self.errors = dict(errors)
        self.completions: Sequence[Any] = ()
        first = min(self.errors)
        super().__init__(
            f"{len(self.errors)} of {count} prompts failed; number {first}: {self.errors[first]}"
        )
