"""One mathematical model, written another way: attention by einsum, by the math kernel, by complex rotary tables, with shared and
stacked weights; an exponential average of the weights and a running statistic in a buffer follow the training."""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from smallgpt import IGNORE, VOCAB, clip, make_batch, share
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import trainverify as tv

RANKS = 2
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, DECAY, MOMENTUM = 8, 4, 2, 2, 3, 0.9, 0.1


def rotate(x, positions):
    """Pairs of neighbours as complex numbers, turned by their position: (batch, length, heads, head_dim)."""
    frequency = 1000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    turn = torch.polar(torch.ones(len(positions), HEAD_DIM // 2), torch.outer(positions.float(), frequency))
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).type_as(x)


def rotate_real(x, positions):
    """The same in real numbers."""
    frequency = torch.exp(-math.log(1000.0) * torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = positions[:, None, None] * frequency
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


class Attention(nn.Module):
    rotate = staticmethod(rotate)

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n * HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x):
        positions = torch.arange(x.shape[1])
        q, k, v = (w(x).unflatten(-1, (-1, HEAD_DIM)) for w in (self.q, self.k, self.v))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        return self.o(self.attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Math(Attention):
    rotate = staticmethod(rotate_real)

    def attend(self, q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return super().attend(q, k, v)


class Einsum(Attention):
    def attend(self, q, k, v):
        q = q.unflatten(1, (KV_HEADS, -1))
        scores = torch.einsum("bgrqd,bgkd->bgrqk", q, k) * HEAD_DIM ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).flatten(1, 2)


class Baddbmm(Attention):
    """The mask is added, and the softmax is written out; repeated keys and values."""

    def attend(self, q, k, v):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        mask = torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
        scores = torch.baddbmm(mask.expand(q.shape[0] * HEADS, -1, -1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=HEAD_DIM ** -0.5)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        return (weights / weights.sum(-1, keepdim=True) @ v.flatten(0, 1)).unflatten(0, (-1, HEADS))


class Experts(nn.Module):
    """Every expert for every token, weighed by a router: weights are stacked."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 6) / 3), nn.Parameter(torch.randn(EXPERTS, 6, HIDDEN) / 3)

    def forward(self, x):
        y = torch.einsum("blh,ehf->blef", x, self.up).relu().square()
        return torch.einsum("ble,blef,efh->blh", self.router(x).softmax(-1), y, self.down)


class Model(nn.Module):
    """One block that is used twice, tied embeddings, and a buffer with the mean square of the activations."""

    def __init__(self, attention=Attention):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm1, self.attention, self.norm2, self.mlp = nn.RMSNorm(HIDDEN), attention(), nn.RMSNorm(HIDDEN, eps=1e-5), Experts()
        self.register_buffer("scale", torch.ones(()))
        self.mean = lambda x: x

    def forward(self, tokens):
        x = self.embed(tokens) * math.sqrt(HIDDEN)
        for _ in range(2):
            x = x + self.attention(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        with torch.no_grad():
            self.scale.lerp_(self.mean(x.detach().square().mean()), MOMENTUM)
        return F.linear(x, self.embed.weight)


def loss_of(model, data, total):
    logits = model(data["tokens"])
    return F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=IGNORE, reduction="sum") / total


def training(model, module, data, count, scale=1.0, report=lambda x: x, clip=clip, context=torch.enable_grad):
    """module holds the parameters of `model`, which may wrap it. average: a moving average of the weights, which starts as a copy of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = [p.detach().clone() for p in module.parameters()]

    def step():
        with context():
            loss = loss_of(model, data, count())
            (loss * scale).backward()
        norm = clip(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in module.parameters()], 1 - DECAY)
            total = torch.stack([(a * a).sum() for a in average]).sum()
        return {"loss": report(loss), "norm": norm, "average": total}

    return tv.Training(module, step, batch=data)


def reference():
    torch.manual_seed(0)
    model, batch = Model(), make_batch()
    return training(model, model, batch, lambda: (batch["labels"] != IGNORE).sum())


def run(ref, model, wrong=False, wrap=DistributedDataParallel, **options):
    model.load_state_dict(ref.weights)
    world, rank = dist.get_world_size(), dist.get_rank()
    data = share(ref.batch, world, rank)

    def count():
        total = (data["labels"] != IGNORE).sum()
        dist.all_reduce(total)
        return total

    def mean(x):
        dist.all_reduce(x, op=dist.ReduceOp.AVG)
        return x

    if not wrong:
        model.mean = mean
    return training(wrap(model), model, data, count, scale=world, report=lambda x: tv.local(x, reduce="sum"), **options)


def ddp(model, **options):
    return DistributedDataParallel(model, broadcast_buffers=False, **options)


def math_kernel(ref, wrong):
    return run(ref, Model(Math), wrong, ddp)


def einsum(ref, wrong):
    return run(ref, Model(Einsum), wrong, ddp)


def baddbmm(ref, wrong):
    return run(ref, Model(Baddbmm), wrong, ddp)


def autocast(ref, wrong):
    """bfloat16 by autocast, no scaler."""
    return run(ref, Model(), wrong, ddp, context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))


def compiled(ref, wrong):
    return run(ref, Model(), wrong, lambda model: torch.compile(ddp(model)))


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
