"""Quantized mixture-of-experts language models on your own machine.

import moelocal
model = moelocal.load()
print(moelocal.generate(model, "Hello!").text)
"""

from moelocal import machine as _machine  # noqa: F401  first: it sets what MLX reads when it starts
from moelocal.engine.completion import Completion, Event, Timing, TokenLogprob, Usage
from moelocal.engine.generate import Request, generate, stream
from moelocal.engine.load import Model, load
from moelocal.engine.reuse import Miss
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session
from moelocal.errors import MoelocalError
from moelocal.text.tool_calls import ToolCall

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Event",
    "Miss",
    "Model",
    "MoelocalError",
    "Request",
    "Sampling",
    "Session",
    "Timing",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "generate",
    "load",
    "stream",
]
