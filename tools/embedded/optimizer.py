"""Muon for the hidden matrices, AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/): momentum, then the update's singular values are brought near 1 by
five Newton-Schulz steps. Matrices of one shape are stacked, so that a step is a few batched products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Stack of matrices [N, R, C] -> the same with singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    flip = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if flip else x
    for _ in range(steps):
        s = x @ x.transpose(-1, -2)
        x = a * x + (b * s + c * s @ s) @ x
    return (x.transpose(-1, -2) if flip else x).float()


class Muon(torch.optim.Optimizer):
    """Parameters of two or three dims, the last two being the matrix."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                by_shape.setdefault(tuple(p.shape[-2:]), []).append((p, update.reshape(-1, *p.shape[-2:])))
            for (rows, cols), members in by_shape.items():
                updates = newton_schulz(torch.cat([u for _, u in members]))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for (p, _), update in zip(members, updates.split([len(u) for _, u in members]), strict=True):
                    p.mul_(1 - group["lr"] * 0.01).sub_(update.reshape(p.shape), alpha=scale)


def build(model: nn.Module, muon_lr: float = 0.02, adam_lr: float = 0.003) -> list[torch.optim.Optimizer]:
    """Muon for matrices of at least 32 x 32 inside the layers; AdamW for the rest, embedding and head included."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        big = p.ndim >= 2 and min(p.shape[-2:]) >= 32
        (hidden if big and "embed_tokens" not in name and "lm_head" not in name else rest).append(p)
    return [Muon(hidden, muon_lr), torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
