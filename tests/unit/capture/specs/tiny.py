"""A tiny transformer, its data and its reference, shared by the specs."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainverify as tv

VOCAB, DIM, HEADS, FFN, LAYERS, ROWS, LENGTH = 12, 8, 4, 12, 4, 4, 8


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (w(x).view(b, s, -1, DIM // HEADS).transpose(1, 2) for w in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, FFN, bias=False), nn.Linear(FFN, DIM, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class Block(nn.Module):
    def __init__(self, mlp=Mlp):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = Norm(), Attention(), Norm(), mlp()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, mlp=Mlp, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block(mlp) for _ in range(LAYERS))
        self.norm, self.head = Norm(), nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.head(self.norm(x))


class Stage(nn.Module):
    """Layers start..end of a model, with the embedding before the first and the head after the last."""

    def __init__(self, model, start, end, first, last):
        super().__init__()
        self.embed = model.embed if first else None
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in range(start, end)})
        self.norm, self.head = (model.norm, model.head) if last else (None, None)

    def forward(self, x):
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x))


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(rows=ROWS):
    numbers = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return {"tokens": numbers[:, :-1].contiguous(), "labels": numbers[:, 1:].contiguous()}


def training(model, parameters, data, backward=None, clip=True, optimizer=torch.optim.AdamW):
    """The step that nearly all programs here make; `backward` runs forward and backward and returns the loss; clip: True, or what clips."""
    stepper = optimizer(parameters, lr=1e-2)

    def plain():
        loss = loss_of(model(data["tokens"]), data["labels"])
        loss.backward()
        return loss

    def step():
        loss = (backward or plain)()
        reported = {"loss": loss}
        if clip:
            reported["norm"] = clip(0.5) if callable(clip) else nn.utils.clip_grad_norm_(parameters, 0.5)
        stepper.step()
        stepper.zero_grad()
        return reported

    return tv.Training(model, step, batch=data)


def reference():
    torch.manual_seed(0)
    model = Model()
    return training(model, list(model.parameters()), batch())
