"""Which experts a token goes to, and with what weight. Float32 throughout.

p = softmax(logits) over all E experts; the K largest are chosen, ties to the lower index; their probabilities are the
weights, divided by their sum if `normalize` (Qwen3.5/3.6 always; `norm_topk_prob` elsewhere).
logits [N, E] -> experts uint32 [N, K] by falling weight, weights float32 [N, K].
"""

from __future__ import annotations

import mlx.core as mx

from moelocal.ops.op import Op


def reference(logits: mx.array, per_token: int, normalize: bool) -> tuple[mx.array, mx.array]:
    p = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    count = p.shape[-1]
    # experts that come before expert j: those with a larger p, or with an equal one and a lower index
    earlier = mx.arange(count)[:, None] < mx.arange(count)
    before = (p[:, :, None] > p[:, None, :]) | ((p[:, :, None] == p[:, None, :]) & earlier)
    rank = mx.sum(before, axis=1)
    chosen = mx.argmin(mx.abs(rank[:, None, :] - mx.arange(per_token)[:, None]), axis=-1)
    weights = mx.take_along_axis(p, chosen, axis=-1)
    if normalize:
        weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    return chosen.astype(mx.uint32), weights


def portable(logits: mx.array, per_token: int, normalize: bool) -> tuple[mx.array, mx.array]:
    logits = logits.astype(mx.float32)
    scores = logits if normalize else mx.softmax(logits, axis=-1, precise=True)
    chosen = mx.argsort(-scores, axis=-1)[:, :per_token]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    # the softmax over the chosen logits alone is the softmax over all of them, renormalised
    return chosen, mx.softmax(weights, axis=-1, precise=True) if normalize else weights


route = Op("route", reference=reference, portable=portable)
