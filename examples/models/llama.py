"""A Llama in plain PyTorch: grouped-query attention, rotary embeddings, SwiGLU, RMSNorm.

No two of its sizes are equal unless they have to be, and no two rows of its batches count the same number of
tokens: symmetric toy inputs hide half of all bugs of distributed training.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100


@dataclass(frozen=True)
class Config:
    vocab: int = 36
    hidden: int = 20
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 4
    ffn: int = 28
    layers: int = 2


def rope_table(positions, head_dim, base=10_000.0):
    """The rotation of every position: cosines and sines of shape (positions, head_dim / 2)."""
    frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = positions[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotate the halves of each head of x: (batch, heads, sequence, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def split_heads(x, head_dim):
    """(batch, sequence, heads * head_dim) -> (batch, heads, sequence, head_dim); the heads may be one rank's."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, hidden, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.heads // config.kv_heads
        self.wq = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (split_heads(w(x), self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        return self.wo(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config, attention=Attention, mlp=SwiGLU):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = attention(config)
        self.mlp_norm = RMSNorm(config.hidden)
        self.mlp = mlp(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(self, config, attention=Attention, mlp=SwiGLU):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config, attention, mlp) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, tokens, positions=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1])
        cos, sin = rope_table(positions, self.config.head_dim)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def token_loss(logits, labels, reduction="mean"):
    """Next-token cross-entropy over the labels that count."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction=reduction)


def random_batch(rows, length, vocab):
    """Token ids and next-token labels. Prompts and padding do not count; their lengths differ from row to row, and
    with this seed so do the counts of the parts that the examples cut the batch into."""
    generator = torch.Generator().manual_seed(84)
    text = torch.randint(vocab, (rows, length + 1), generator=generator)
    prompt = torch.randint(length - 2, (rows, 1), generator=generator)
    padding = torch.randint(3, (rows, 1), generator=generator)
    place = torch.arange(length)
    counts = (place >= prompt) & (place < length - padding)
    return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].where(counts, IGNORE)}
