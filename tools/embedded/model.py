"""The embedded model in PyTorch, written to train fast on a CPU.

Parameters carry the names of the original implementation (transformers, modeling_qwen3_5_moe.py), so that exporting is
renaming. Equations: docs/embedded-model.md and the library's `ops`. Documents are batched by length and padded on the
right, which a causal model does not see; no packing, so nothing has to be reset inside a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are the shipped one's."""

    hidden: int = 128
    layers: int = 8
    vocab: int = 1536
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 16
    rope_base: float = 100_000.0
    key_heads: int = 2
    value_heads: int = 4
    delta_dim: int = 32
    conv_width: int = 4
    experts: int = 16
    per_token: int = 4
    width: int = 64
    shared_width: int = 128
    eps: float = 1e-6
    chunk: int = 32

    def is_attention(self, layer: int) -> bool:
        """Every fourth layer, as in the flagship."""
        return (layer + 1) % 4 == 0


class OffsetNorm(nn.Module):
    """RMS norm with weight 1 + w."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), (1 + self.weight).to(x.dtype), self.eps)


class PlainNorm(nn.Module):
    """RMS norm with weight w."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def matrix(rows: int, cols: int) -> nn.Linear:
    layer = nn.Linear(cols, rows, bias=False)
    nn.init.normal_(layer.weight, std=cols**-0.5 * 0.7)
    return layer


class Conv(nn.Module):
    """Causal depthwise convolution [B, T, C], as shifted sums: a CPU does those faster than a grouped convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        width, time = self.weight.shape[-1], x.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        return sum(padded[:, i : i + time] * self.weight[:, 0, i] for i in range(width))


class DeltaNet(nn.Module):
    """Gated delta net, chunked form (arXiv 2412.06464, section 3.3)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        values = s.value_heads * s.delta_dim
        channels = 2 * s.key_heads * s.delta_dim + values
        self.in_proj_qkv, self.in_proj_z = matrix(channels, s.hidden), matrix(values, s.hidden)
        self.in_proj_b, self.in_proj_a = matrix(s.value_heads, s.hidden), matrix(s.value_heads, s.hidden)
        self.conv1d = Conv(channels, s.conv_width)
        # half-lives from a few to some hundred tokens at the start
        self.A_log = nn.Parameter(torch.zeros(s.value_heads))
        self.dt_bias = nn.Parameter(torch.linspace(-6.0, -1.5, s.value_heads))
        self.norm = PlainNorm(s.delta_dim, s.eps)
        self.out_proj = matrix(s.hidden, values)

    def forward(self, x: Tensor) -> Tensor:
        s, (batch, time, _) = self.s, x.shape
        u = F.silu(self.conv1d(self.in_proj_qkv(x)))
        keys, ratio = s.key_heads * s.delta_dim, s.value_heads // s.key_heads
        q, k, v = u.split([keys, keys, s.value_heads * s.delta_dim], dim=-1)

        def heads(a: Tensor) -> Tensor:
            return a.reshape(batch, time, -1, s.delta_dim)

        q, k, v = heads(q), heads(k), heads(v)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * s.delta_dim**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        q, k = q.repeat_interleave(ratio, 2), k.repeat_interleave(ratio, 2)
        beta = torch.sigmoid(self.in_proj_b(x))
        log_decay = -self.A_log.exp() * F.softplus(self.in_proj_a(x) + self.dt_bias)
        with torch.autocast("cpu", enabled=False):  # the recurrence stays float32 when training in bfloat16
            out = chunked_delta_rule(*(a.float() for a in (q, k, v, log_decay, beta)), s.chunk)
        y = self.norm(out) * F.silu(heads(self.in_proj_z(x)))
        return self.out_proj(y.reshape(batch, time, -1))


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, size: int) -> Tensor:
    """q, k, v [B, T, H, D], log_decay, beta [B, T, H] -> [B, T, H, D], from a zero state."""
    batch, time, heads, dim = q.shape
    short = -time % size

    def chunks(a: Tensor) -> Tensor:
        a = F.pad(a, (0, 0) * (a.ndim - 2) + (0, short))
        return a.reshape(batch, -1, size, *a.shape[2:]).transpose(2, 3)

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta).unsqueeze(-1)  # [B, N, H, C, D]
    log_g = chunks(log_decay).cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    ratio = (log_g[..., :, None] - log_g[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    g = log_g.exp().unsqueeze(-1)
    system = (beta * ratio * (k @ k.transpose(-1, -2))).tril(-1)
    right = torch.cat([beta * v, beta * g * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, from_state = solved.split(dim, dim=-1)
    within = ratio * (q @ k.transpose(-1, -2))
    to_end = (log_g[..., -1:] - log_g).exp().unsqueeze(-1) * k
    gq, last = g * q, g[..., -1:, :]
    state, outputs = q.new_zeros(batch, heads, dim, dim), []
    for n in range(q.shape[1]):
        delta = own[:, n] - from_state[:, n] @ state
        outputs.append(gq[:, n] @ state + within[:, n] @ delta)
        state = last[:, n] * state + to_end[:, n].transpose(-1, -2) @ delta
    return torch.stack(outputs, 1).transpose(2, 3).reshape(batch, -1, heads, dim)[:, :time]


class Attention(nn.Module):
    """Output-gated attention with q/k norm and partial rotary embedding."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = matrix(2 * s.heads * s.head_dim, s.hidden)
        self.k_proj, self.v_proj = (matrix(s.kv_heads * s.head_dim, s.hidden) for _ in range(2))
        self.o_proj = matrix(s.hidden, s.heads * s.head_dim)
        self.q_norm, self.k_norm = OffsetNorm(s.head_dim, s.eps), OffsetNorm(s.head_dim, s.eps)

    def forward(self, x: Tensor) -> Tensor:
        s, (batch, time, _) = self.s, x.shape
        q, gate = self.q_proj(x).reshape(batch, time, s.heads, -1).chunk(2, dim=-1)
        q = rotate(self.q_norm(q).transpose(1, 2), s)
        k = rotate(self.k_norm(self.k_proj(x).reshape(batch, time, s.kv_heads, -1)).transpose(1, 2), s)
        v = self.v_proj(x).reshape(batch, time, s.kv_heads, -1).transpose(1, 2)
        ratio = s.heads // s.kv_heads
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, -1)
        return self.o_proj(y * torch.sigmoid(gate.reshape(batch, time, -1)))


def rotate(x: Tensor, s: Shape) -> Tensor:
    """Rotary embedding of the first `rotary_dim` dims of [B, H, T, D]."""
    half = s.rotary_dim // 2
    angle = torch.arange(x.shape[2])[:, None] * s.rope_base ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = matrix(width, hidden), matrix(width, hidden)
        self.down_proj = matrix(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(s.experts, 2 * s.width, s.hidden) * s.hidden**-0.5 * 0.7)
        self.down_proj = nn.Parameter(torch.randn(s.experts, s.hidden, s.width) * s.width**-0.5 * 0.7)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, H]: the tokens of each expert are gathered into one padded batch, so that three products serve all."""
        count, per_token = len(self.down_proj), chosen.shape[1]
        flat = chosen.reshape(-1)
        order = flat.argsort()
        sizes = torch.bincount(flat, minlength=count)
        room = -(-int(sizes.max()) // 64) * 64  # few different shapes: oneDNN compiles a kernel for each
        slot = torch.arange(len(flat)) - (sizes.cumsum(0) - sizes)[flat[order]]
        place = flat[order] * room + slot
        token = torch.full((count * room,), len(x)).index_copy(0, place, order // per_token)
        share = torch.zeros(count * room).index_copy(0, place, weights.reshape(-1)[order])
        rows = F.pad(x, (0, 0, 0, 1)).index_select(0, token).reshape(count, room, -1)
        gate, up = torch.bmm(rows, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down_proj.transpose(1, 2)).reshape(count * room, -1)
        total = torch.zeros(len(x) + 1, x.shape[1]).index_add(0, token, out.float() * share[:, None])
        return total[:-1].to(x.dtype)


class MoE(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.per_token = s.per_token
        self.gate, self.shared_expert_gate = matrix(s.experts, s.hidden), matrix(1, s.hidden)
        self.experts, self.shared_expert = Experts(s), SwiGLU(s.shared_width, s.hidden)
        self.balance = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p = self.gate(flat).float().softmax(-1)
        weights, chosen = p.topk(self.per_token, dim=-1)
        load = torch.bincount(chosen.reshape(-1), minlength=p.shape[1]) / len(flat)
        self.balance = p.shape[1] * (load * p.mean(0)).sum()
        y = self.experts(flat, chosen, weights / weights.sum(-1, keepdim=True))
        y = y + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return y.reshape(x.shape)


class Block(nn.Module):
    def __init__(self, s: Shape, attention: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            OffsetNorm(s.hidden, s.eps),
            OffsetNorm(s.hidden, s.eps),
        )
        if attention:
            self.self_attn = Attention(s)
        else:
            self.linear_attn = DeltaNet(s)
        self.mlp = MoE(s)
        self.mixer = [
            self.self_attn if attention else self.linear_attn
        ]  # in a list: no second name for its weights

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.mixer[0](self.input_layernorm(x))
        return h + self.mlp(self.post_attention_layernorm(h))


class Text(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Block(s, s.is_attention(i)) for i in range(s.layers))
        self.norm = OffsetNorm(s.hidden, s.eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Mtp(nn.Module):
    """Depth-1 multi-token prediction: from the state at t and the embedding of token t + 1, the token at t + 2."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = (
            OffsetNorm(s.hidden, s.eps),
            OffsetNorm(s.hidden, s.eps),
        )
        self.fc = matrix(s.hidden, 2 * s.hidden)
        self.layers = nn.ModuleList([Block(s, attention=True)])
        self.norm = OffsetNorm(s.hidden, s.eps)

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1)
        return self.norm(self.layers[0](self.fc(joined)))


class Embedded(nn.Module):
    """The whole model: `model`, `lm_head`, `mtp`."""

    def __init__(self, s: Shape | None = None) -> None:
        super().__init__()
        self.shape = s or Shape()
        self.model = Text(self.shape)
        self.lm_head = matrix(self.shape.vocab, self.shape.hidden)
        self.mtp = Mtp(self.shape)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> logits [B, T, V]."""
        return self.lm_head(self.model(ids))

    def loss(
        self, ids: Tensor, weights: Tensor, mtp_weight: float = 0.2, balance_weight: float = 0.001
    ) -> Tensor:
        """Mean cross entropy of the tokens with weight > 0 given those before, the MTP layer's, and routing balance."""
        hidden = self.model(ids)
        main = self._entropy(hidden[:, :-1], ids[:, 1:], weights[:, 1:])
        ahead = self.mtp(self.model.embed_tokens(ids[:, 1:-1]), hidden[:, :-2])
        extra = self._entropy(ahead, ids[:, 2:], weights[:, 2:])
        balance = sum(layer.mlp.balance for layer in [*self.model.layers, *self.mtp.layers])
        self.parts = (main.item(), extra.item())
        return main + mtp_weight * extra + balance_weight * balance

    def _entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        chosen = weights.reshape(-1).nonzero()[:, 0]
        chosen = F.pad(chosen, (0, -len(chosen) % 256))  # to few different shapes, with the first position
        weights = weights.reshape(-1)[chosen]
        logits = self.lm_head(hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen)).float()
        losses = F.cross_entropy(logits, targets.reshape(-1)[chosen], reduction="none")
        return (losses * weights).sum() / weights.sum()
