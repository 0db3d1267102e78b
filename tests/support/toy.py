"""A toy model with one thing about it that may be wrong: what looks like an MLP or an attention, and is none."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from moectl.shards.look.skeleton import Skeleton, empty

WIDTH, HIDDEN, HEADS, VOCABULARY = 32, 64, 4, 40


class MLP(nn.Module):
    """`odd` is what is wrong: across, residual, interleaved, unused, strange."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        rows = 2 * HIDDEN if odd in ("fused", "interleaved") else HIDDEN
        self.up_proj = nn.Linear(WIDTH, rows, bias=True)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=True)
        if odd == "strange":
            self.down_proj.smooth = mx.ones((HIDDEN,))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.up_proj(x)
        if self.odd == "fused":
            gate, up = mx.split(y, 2, axis=-1)
            y = nn.silu(gate) * up
        elif self.odd == "interleaved":
            y = nn.silu(y[..., ::2]) * y[..., 1::2]
        elif self.odd == "across":
            y = y - y.mean(axis=-1, keepdims=True)
        elif self.odd == "unused":
            y = x @ self.up_proj.weight.T  # past any hook
        found: mx.array = self.down_proj(nn.silu(y))
        return found + x if self.odd == "residual" else found


class Attention(nn.Module):
    """`odd`: norm over all heads, keys (given to others, too)."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.n_heads = self.n_kv_heads = HEADS
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=True))
        self.sinks = mx.zeros((HEADS,))

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> Any:
        B, L, _ = x.shape
        q = self.q_proj(x)
        if self.odd == "norm":
            q = mx.fast.rms_norm(q, None, 1e-5)
        q = q.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        k, v = (y.reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3) for y in (self.k_proj(x), self.v_proj(x)))
        k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=0.3, mask=mask, sinks=self.sinks)
        found = self.o_proj(y.transpose(0, 2, 1, 3).reshape(B, L, -1))
        return (found, k) if self.odd == "keys" else found


class Layer(nn.Module):
    """`odd`: squared (the block is not linear in its unit)."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.attn = Attention(odd)
        self.mlp = Squared(odd) if odd == "squared" else MLP(odd)

    def __call__(self, x: mx.array, mask: Any, cache: Any, first: mx.array | None = None) -> mx.array:
        found = self.attn(x, mask, cache)
        x = x + (found[0] if isinstance(found, tuple) else found)
        if first is not None:
            x = x + first
        after: mx.array = x + self.mlp(x)
        return after


class Squared(nn.Module):
    def __init__(self, odd: str) -> None:
        super().__init__()
        self.inner = MLP(odd)

    def __call__(self, x: mx.array) -> mx.array:
        found: mx.array = self.inner(x)
        return found * found


class Toy(nn.Module):
    """`odd`: twice (layers are used twice), first (all layers see the first one's state), sum (of all states)."""

    def __init__(self, odd: str = "", count: int = 2) -> None:
        super().__init__()
        self.odd = odd
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = [Layer(odd) for _ in range(count)]
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        x = self.embed(tokens)
        mask = create_attention_mask(x, cache[0])
        states: list[mx.array] = []
        for number, layer in enumerate(self.layers):
            own = cache[0] if self.odd == "cache" else cache[number]
            x = layer(x, mask, own, states[0] if self.odd == "first" and states else None)
            states.append(x)
        if self.odd == "twice":
            x = self.layers[0](x, mask, cache[0])
        if self.odd == "sum":
            x = sum(states[1:], states[0])
        logits: mx.array = self.head(x)
        return logits


def make_toy(odd: str = "") -> Skeleton:
    model = Toy(odd)
    empty(model)
    model.eval()
    return Skeleton(model, f"toy {odd}".strip())
