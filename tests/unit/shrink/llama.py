"""A small Llama twice: as a spec at its full sizes, and as a plain model that has any sizes and takes every count as a literal."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import trainverify as tv


@dataclass(frozen=True)
class Sizes:
    samples: int
    sequence: int
    vocabulary: int
    hidden: int
    heads: int
    shared: int                               # key and value heads
    head_dim: int
    inner: int


FULL = Sizes(samples=8, sequence=11, vocabulary=70, hidden=32, heads=21, shared=7, head_dim=20, inner=44)
LAYERS = 2


class Block(nn.Module):
    """`count`: the sizes that occur as literals; None: what PyTorch counts."""

    def __init__(self, s: Sizes, count: Sizes | None):
        super().__init__()
        self.s, self.count = s, count
        self.norm1, self.norm2 = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        self.wq = nn.Parameter(torch.randn(s.heads * s.head_dim, s.hidden) * 0.2)
        self.wk = nn.Parameter(torch.randn(s.shared * s.head_dim, s.hidden) * 0.2)
        self.wv = nn.Parameter(torch.randn(s.shared * s.head_dim, s.hidden) * 0.2)
        self.wo = nn.Parameter(torch.randn(s.hidden, s.heads * s.head_dim) * 0.2)
        self.gate, self.up = nn.Parameter(torch.randn(s.inner, s.hidden) * 0.2), nn.Parameter(torch.randn(s.inner, s.hidden) * 0.2)
        self.down = nn.Parameter(torch.randn(s.hidden, s.inner) * 0.2)

    def normed(self, x, weight):
        square = x.pow(2).mean(-1, keepdim=True) if self.count is None else x.pow(2).sum(-1, keepdim=True) / self.count.hidden
        return x * torch.rsqrt(square + 1e-5) * weight

    def rotated(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x, cos, sin):
        s, h = self.s, self.normed(x, self.norm1)
        q, k, v = ((h @ w.t()).view(s.samples, s.sequence, -1, s.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
        k, v = (y[:, :, None].expand(-1, -1, s.heads // s.shared, -1, -1).reshape(s.samples, s.heads, s.sequence, s.head_dim) for y in (k, v))
        scale = None if self.count is None else 1 / math.sqrt(self.count.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).reshape(s.samples, s.sequence, -1)
        x = x + y @ self.wo.t()
        h = self.normed(x, self.norm2)
        return x + (F.silu(h @ self.gate.t()) * (h @ self.up.t())) @ self.down.t()


class Llama(nn.Module):
    def __init__(self, s: Sizes, count: Sizes | None = None):
        super().__init__()
        self.s, self.head_dim = s, (count or s).head_dim
        self.positions = None                 # 0, 1, 2 and so on
        self.embed = nn.Parameter(torch.randn(s.vocabulary, s.hidden))
        self.blocks = nn.ModuleList([Block(s, count) for _ in range(LAYERS)])
        self.head = nn.Parameter(torch.randn(s.vocabulary, s.hidden) * 0.2)

    def forward(self, tokens):
        positions = torch.arange(self.s.sequence) if self.positions is None else self.positions
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, self.s.head_dim, 2) / self.head_dim)
        x = F.embedding(tokens, self.embed)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return x @ self.head.t()


def training(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch)


def reference():
    torch.manual_seed(0)
    drawn = torch.randint(0, FULL.vocabulary, (FULL.samples, FULL.sequence + 1))
    labels = drawn[:, 1:].clone()
    labels[:, -1] = -100
    return training(Llama(FULL), {"tokens": drawn[:, :-1].contiguous(), "labels": labels})


def parallel(ref):
    model = Llama(FULL)
    model.load_state_dict(ref.weights)
    return training(model, ref.batch)
