"""Which experts a token goes to, with what weight, and how much of the shared expert it takes. Float32 throughout.

The K experts with the largest logits are chosen, ties to the lower index (the logits are ranked, not their softmax:
that rounds different logits to one probability). Their weights are p = softmax(logits) over all E, or, if `normalize`,
p divided by its sum over the chosen (Qwen3.5/3.6 always; `norm_topk_prob` elsewhere).

logits [..., E], or with `shared` [..., E + 1] whose last column is the gate s of the shared expert
-> chosen uint32 [..., K] by falling weight, weights float32 [..., K], share = σ(s) float32 [..., 1] or None.

A NaN ranks below every number, and makes NaN of the weights that it enters: all if not `normalize`, else those of a
token that has fewer than K numbers. The chosen are distinct experts even then.
"""

from __future__ import annotations

import mlx.core as mx

from moelocal.metal import Kernel
from moelocal.ops.op import Op

Result = tuple[mx.array, mx.array, mx.array | None]

MOST_EXPERTS = 512
"""What the kernel takes: 16 logits in the registers of a lane. One lane per chosen expert, so K is at most 32."""


def _parts(logits: mx.array, shared: bool) -> tuple[mx.array, mx.array | None]:
    """The experts' logits in float32, and the share."""
    logits = logits.astype(mx.float32)
    return (logits[..., :-1], mx.sigmoid(logits[..., -1:])) if shared else (logits, None)


def reference(logits: mx.array, per_token: int, normalize: bool, shared: bool) -> Result:
    logits, share = _parts(logits, shared)
    index, nan = mx.arange(logits.shape[-1]), mx.isnan(logits)
    # experts that come before expert j: those with a larger logit, or with an equal one and a lower index
    left, right = logits[..., :, None], logits[..., None, :]
    larger = (left > right) | (~nan[..., :, None] & nan[..., None, :])
    equal = (left == right) | (nan[..., :, None] & nan[..., None, :])
    rank = mx.sum(larger | (equal & (index[:, None] < index)), axis=-2)
    chosen = mx.argmin(mx.abs(rank[..., None, :] - mx.arange(per_token)[:, None]), axis=-1)
    if normalize:  # the softmax over the chosen alone is the softmax over all of them, renormalised
        weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1, precise=True)
    else:
        weights = mx.take_along_axis(mx.softmax(logits, axis=-1, precise=True), chosen, axis=-1)
    return chosen.astype(mx.uint32), weights, share


def portable(logits: mx.array, per_token: int, normalize: bool, shared: bool) -> Result:
    logits, share = _parts(logits, shared)
    chosen = mx.argsort(-logits, axis=-1)[..., :per_token]
    scores = logits if normalize else mx.softmax(logits, axis=-1, precise=True)
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return chosen, mx.softmax(weights, axis=-1, precise=True) if normalize else weights, share


ROUTE = Kernel(
    name="route",
    file="route",
    inputs=("logits",),
    outputs=("chosen", "weights", "share"),
    call="""route<SLOTS, NORMALIZE, SHARED>(logits, chosen, weights, share, EXPERTS, PER_TOKEN,
    threadgroup_position_in_grid.x, thread_index_in_simdgroup);""",
)


def metal(logits: mx.array, per_token: int, normalize: bool, shared: bool) -> Result:
    *lead, columns = logits.shape
    count, tokens = columns - shared, logits.size // columns
    chosen, weights, share = ROUTE(
        [logits.astype(mx.float32)],
        shapes=[(*lead, per_token), (*lead, per_token), (*lead, 1)],
        dtypes=[mx.uint32, mx.float32, mx.float32],
        grid=(tokens * 32, 1, 1),
        threadgroup=(32, 1, 1),
        template={
            "EXPERTS": count,
            "SLOTS": -(-count // 32),
            "PER_TOKEN": per_token,
            "NORMALIZE": normalize,
            "SHARED": shared,
        },
    )
    return chosen, weights, share if shared else None


def supports(logits: mx.array, per_token: int, normalize: bool, shared: bool) -> bool:
    count = logits.shape[-1] - shared
    return logits.size >= 8 and per_token <= min(32, count) and count <= MOST_EXPERTS


route = Op("route", reference=reference, portable=portable, metal=metal, supports=supports)
