"""From logits to a token, on the device: no host synchronisation and no sort of a large vocabulary.

Order of operations, each skipped where it is off:

1. repetition penalty (Hugging Face: a positive logit is divided, another one multiplied; over prompt and
   answer);
2. frequency and presence penalty (OpenAI: subtracted; over the tokens of the answer alone);
3. logit bias (OpenAI: added), then rows that hold no token become -inf, whatever was added to them;
4. temperature; 0 takes the largest logit (the lowest id among equals) and ends here;
5. top_k, then top_p within what top_k left, then min_p relative to the likeliest token (as Hugging Face);
6. one draw from the rest, renormalised: the argmax of logits plus Gumbel noise (5 and 6: `ops/sample.py`).

A draw is a function of (logits, seed, step): the key of step n is counted up from the seed, so nothing is
carried along the steps but the token counts, and those only where a penalty asks for them.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from moelocal.errors import RequestError
from moelocal.ops.op import setting
from moelocal.ops.sample import largest, noise_size, sample

BAD_LOGITS = -1
"""The token of a `Sampler` where the largest logit is NaN or infinite; the engine raises when it reads it."""

_NOTHING = -math.inf
_LOW_64_BITS = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Values that are off change nothing: 1.0, 0 or 0.0 as in the defaults.

    `temperature` >= 0, 0 is greedy. `top_p` in (0, 1]. `top_k` >= 0, 0 is off. `min_p` in [0, 1].
    `presence_penalty` and `frequency_penalty`: finite, subtracted from the logits of tokens that the answer
    already holds, once and per occurrence. `repetition_penalty` > 0, over prompt and answer. `logit_bias`:
    token id to the finite number that is added to its logit.

    Raises RequestError where a value is not of this kind.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, "a number from 0", lambda x: x >= 0)
        _check_real("top_p", self.top_p, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        _check_real("min_p", self.min_p, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _check_real("presence_penalty", self.presence_penalty, "a finite number", lambda x: True)
        _check_real("frequency_penalty", self.frequency_penalty, "a finite number", lambda x: True)
        _check_real("repetition_penalty", self.repetition_penalty, "a number above 0", lambda x: x > 0)
        if not _is_int(self.top_k) or self.top_k < 0:
            raise _refuse("top_k", "an integer from 0 (0: off)", self.top_k)
        if not isinstance(self.logit_bias, Mapping):
            raise _refuse("logit_bias", "a mapping of token id to number", self.logit_bias)
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0:
                raise _refuse("logit_bias", "token ids, integers from 0", token)
            _check_real(f"logit_bias[{token}]", bias, "a finite number", lambda x: True)
        # A copy: a value that is checked once must not change afterwards.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, float | int]) -> Sampling:
        """The sampling that a checkpoint's generation config asks for; what it leaves out keeps our default.

        Raises RequestError for a name that is not a field of `Sampling`.
        """
        known = [each.name for each in fields(cls)]
        unknown = [name for name in defaults if name not in known]
        if unknown:
            raise RequestError(
                f"sampling: unknown field {', '.join(map(repr, unknown))}; known are {', '.join(known)}"
            )
        return cls(**defaults)  # type: ignore[arg-type]


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_real(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(float(value)) or not holds(float(value)):  # type: ignore[arg-type]
        raise _refuse(name, expected, value)


def _refuse(name: str, expected: str, got: object) -> RequestError:
    return RequestError(f"sampling: {name}: expected {expected}, got {got!r}")


class Sampler:
    """Chooses the tokens of one answer, one call per step.

    `token_mask` [V]: True where the vocabulary row holds a token; the other rows are never chosen. `seed`:
    any integer (its low 64 bits count); None draws one. `prompt`: ids that the repetition penalty counts in.

    Raises RequestError for a seed that is no integer and, at the first call, for a biased token outside V.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        token_mask: npt.NDArray[np.bool_] | None,
        seed: int | None,
        prompt: Sequence[int],
    ) -> None:
        if seed is not None and not _is_int(seed):
            raise RequestError(f"seed: expected an integer or None, got {seed!r}")
        self.sampling = sampling
        self._key = secrets.randbits(64) if seed is None else _scramble(int(seed))
        self._token_mask = token_mask
        self._prompt = prompt
        self._draws = sampling.temperature > 0
        self._step = _compiled(replace(sampling, logit_bias={}), setting())
        self._counts: mx.array | None = None
        self._fixed: dict[str, mx.array] | None = None

    def __call__(self, logits: mx.array) -> mx.array:
        """float32 logits [V] or [1, V] of the last position to an int32 token, [] or [1], not yet evaluated.

        `BAD_LOGITS` where the rows that hold a token have a NaN or +inf among them, or nothing above -inf.
        """
        if self._fixed is None:
            self._fixed = self._prepare(logits.shape[-1])
        inputs = [logits]
        if self._draws:
            inputs.append(mx.array([self._key >> 32, self._key & 0xFFFFFFFF], dtype=mx.uint32))
            self._key = (self._key + 1) & _LOW_64_BITS
        if self._counts is not None:
            # The next token depends on these counts, so at most one update is ever waiting to be evaluated.
            token, self._counts = self._step(self._fixed, self._counts, *inputs)
        else:
            token, _ = self._step(self._fixed, None, *inputs)
        return token

    def _prepare(self, vocabulary: int) -> dict[str, mx.array]:
        """The arrays that stay the same for the whole answer; starts the counts where a penalty needs it."""
        sampling = self.sampling
        fixed = {}
        if self._token_mask is not None and not self._token_mask.all():
            fixed["mask"] = mx.array(self._token_mask)
        if sampling.logit_bias:
            outside = [token for token in sampling.logit_bias if token >= vocabulary]
            if outside:
                raise _refuse("logit_bias", f"token ids below {vocabulary}", outside[0])
            bias = np.zeros(vocabulary, dtype=np.float32)
            bias[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
            fixed["bias"] = mx.array(bias)
        if sampling.repetition_penalty != 1:
            in_prompt = np.zeros(vocabulary, dtype=np.bool_)
            in_prompt[np.asarray(self._prompt, dtype=np.int64)] = True
            fixed["in_prompt"] = mx.array(in_prompt)
        if (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
        ):
            self._counts = mx.zeros((vocabulary,), dtype=mx.float32)
        return fixed


def log_probabilities(
    logits: mx.array, token: mx.array, top: int, *, token_mask: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Natural-log probabilities under the model itself: float32 log-softmax of the raw logits over all rows.

    `logits` [V] or [1, V], `token` int32 [] or [1]. Returns, not yet evaluated: that of `token`, float32 [];
    the ids of the `top` likeliest tokens, int32 [top], likeliest first; theirs, float32 [top]. Rows that are
    False in `token_mask` (bool [V]) are not listed.
    """
    x = logits.reshape(-1).astype(mx.float32)
    total = mx.logsumexp(x)
    chosen = mx.take(x, token.reshape(())) - total
    if top == 0:
        return chosen, mx.zeros((0,), dtype=mx.int32), mx.zeros((0,), dtype=mx.float32)
    listed = x if token_mask is None else mx.where(token_mask, x, _NOTHING)
    values, ids = largest(listed, top)
    return chosen, ids, values - total


def _scramble(seed: int) -> int:
    """64 well-mixed bits of a seed (splitmix64), so that the counted-up keys of near seeds do not meet."""
    z = (seed + 0x9E3779B97F4A7C15) & _LOW_64_BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LOW_64_BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LOW_64_BITS
    return z ^ (z >> 31)


_Step = Callable[..., tuple[mx.array, mx.array | None]]


@functools.lru_cache(maxsize=64)
def _compiled(sampling: Sampling, form: Hashable) -> _Step:
    """The compiled step of one kind of sampling, kept over answers because tracing it takes milliseconds.

    `form` is the setting in effect: a trace holds the form that the op chose when it was made.
    """
    step: _Step = mx.compile(functools.partial(_choose, sampling))
    return step


def _choose(
    sampling: Sampling,
    fixed: dict[str, mx.array],
    counts: mx.array | None,
    logits: mx.array,
    key: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """One step: the token, shaped as the leading axes of `logits`, and the counts [V] with it."""
    x = logits.reshape(-1).astype(mx.float32)
    if counts is not None:
        x = _penalised(sampling, x, counts, fixed.get("in_prompt"))
    if "bias" in fixed:
        x = x + fixed["bias"]
    if "mask" in fixed:
        # Not an added -inf: that would make NaN of a +inf in a row that nobody reads.
        x = mx.where(fixed["mask"], x, _NOTHING)
    highest = mx.max(x)
    if key is None:
        token = mx.argmax(x)
    else:
        # Shifted first: a tiny temperature then gives 0 and -inf, never inf - inf. The bound is float32's.
        token = _draw(sampling, (x - highest) / max(sampling.temperature, 1e-30), key)
    token = mx.where(mx.isfinite(highest), token.astype(mx.int32), BAD_LOGITS)
    if counts is not None:
        counts = counts.at[token].add(1.0)
    return token.reshape(logits.shape[:-1]), counts


def _penalised(sampling: Sampling, x: mx.array, counts: mx.array, in_prompt: mx.array | None) -> mx.array:
    in_answer = counts > 0
    if in_prompt is not None:
        penalty = sampling.repetition_penalty
        x = mx.where(in_prompt | in_answer, mx.where(x > 0, x / penalty, x * penalty), x)
    if sampling.frequency_penalty != 0:
        x = x - sampling.frequency_penalty * counts
    if sampling.presence_penalty != 0:
        x = x - sampling.presence_penalty * in_answer
    return x


def _draw(sampling: Sampling, x: mx.array, key: mx.array) -> mx.array:
    """One token of softmax(x) [V] after truncation; the largest value of `x` is 0."""
    noise = mx.random.gumbel((noise_size(x.size, sampling.top_k),), key=key)
    # Uniform noise of exactly 0 gives -inf, and with one token left argmax would then take row 0. The next
    # smallest value is -log(32 log 2) = -3.1, so this bound changes nothing else.
    return sample(x, mx.maximum(noise, -4.0), sampling.top_k, sampling.top_p, sampling.min_p)
