"""A small GPT-2 (LayerNorm, biases, learned positions, fused qkv, GELU), its data and its training step, shared by the programs here."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainverify as tv

VOCAB, HIDDEN, HEADS, HEAD_DIM, FFN, LAYERS, LENGTH, ROWS, IGNORE = 13, 8, 2, 4, 12, 2, 12, 6, -100
MAX_NORM = 0.1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Mlp(nn.Module):
    def __init__(self, approximate="tanh"):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.approximate = approximate

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, attention=Attention, mlp=Mlp):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(HIDDEN), attention()
        self.norm2, self.mlp = nn.LayerNorm(HIDDEN), mlp()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """recompute: None, or use_reentrant of activation checkpointing."""

    def __init__(self, attention=Attention, mlp=Mlp, layers=LAYERS, tied=False, recompute=None):
        super().__init__()
        self.recompute = recompute
        self.embed, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.layers = nn.ModuleList(Block(attention, mlp) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens, positions=None):
        positions = torch.arange(tokens.shape[1]) if positions is None else positions
        x = self.embed(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return self.head(self.norm(x))


def loss_of(logits, labels, **options):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, **options)


def make_batch(rows=ROWS):
    """Rows count different numbers of tokens, and every token id occurs."""
    generator = torch.Generator().manual_seed(5)
    text = torch.cat([torch.randperm(VOCAB, generator=generator) for _ in range(rows)])[: rows * (LENGTH + 1)].view(rows, LENGTH + 1)
    labels = text[:, 1:].clone()
    for row in range(rows):
        labels[row, : (row * 2) % 5] = IGNORE
    return {"tokens": text[:, :-1].contiguous(), "labels": labels}


def share(batch, n, i):
    return {k: v.tensor_split(n)[i] for k, v in batch.items()}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def clip(parameters):
    return nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def training(model, backward, optimizer=None, clip=clip, batch=None, after=None):
    """backward() runs forward and backward and returns the reported loss; after() follows the optimizer's step."""
    parameters = list(model.parameters())
    optimizer = optimizer or adamw(parameters)

    def step():
        reported = {"loss": backward()}
        if clip:
            reported["norm"] = clip(parameters)
        optimizer.step()
        optimizer.zero_grad()
        if after:
            after()
        return reported

    return tv.Training(model, step, batch=batch)


def reference(**options):
    torch.manual_seed(0)
    model, batch = Gpt(**options), make_batch()

    def backward():
        loss = loss_of(model(batch["tokens"]), batch["labels"])
        loss.backward()
        return loss

    return training(model, backward, batch=batch)


def load(ref, **options):
    model = Gpt(**options)
    model.load_state_dict(ref.weights)
    return model
