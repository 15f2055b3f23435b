"""Models that are no Llama: convolutions with batch statistics, a recurrent network on packed sequences, tables of embedding bags, a selective scan,
a sliding window over a split sequence, a gradient penalty, experts that choose their tokens. `ref` is None on one device."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import trainverify as tv

RANKS = 2
CLASSES = 5


def training(model, loss_of, batch, after=lambda: None, share=lambda x: x):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        after()
        optimizer.step()
        return {"loss": share(loss)}
    return tv.Training(model, step, batch=batch)


def loaded(model, ref):
    model.load_state_dict({k: v for k, v in ref.weights.items() if k in model.state_dict()})
    return model


def rows(batch, of=RANKS):
    return {k: v.chunk(of)[dist.get_rank()] for k, v in batch.items()}


def summed(model, skip=()):
    """Sum the gradients over the ranks, but for the names that begin with these."""
    def after():
        for name, p in model.named_parameters():
            if not name.startswith(tuple(skip)):
                dist.all_reduce(p.grad)
    return after


def whole(x):
    return tv.local(x, "sum")


class Sum(torch.autograd.Function):
    """The sum over ranks, forward (the gradient goes to all) or, with `back`, of the gradient alone."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.back, x = back, x.clone()
        if not back:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        if ctx.back:
            dist.all_reduce(g)
        return g, None


# ---- convolutions, batch norm, adaptive pooling, bilinear interpolation
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.down = nn.Conv2d(2, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(2, 3, 1, 2)
        self.pool, self.head = nn.AdaptiveAvgPool2d((2, 1)), nn.Linear(6, CLASSES)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)) + self.down(x))
        y = y + F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="bilinear")
        return self.head(self.pool(y).flatten(1))


def convolutions(ref, wrong=False):
    if ref is None:
        model, batch = Residual(), {"x": torch.randn(4, 2, 4, 4), "y": torch.tensor([0, 3, 4, 1])}
        return training(model, lambda: F.cross_entropy(model(batch["x"]), batch["y"]), batch)
    model, data = loaded(Residual(), ref), rows(ref.batch)
    model = model if wrong else nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(model)
    return training(model, lambda: F.cross_entropy(ddp(data["x"]), data["y"]), None, share=tv.local)


# ---- packed sequences of unequal lengths
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(7, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 7)

    def forward(self, data):
        x = pack_padded_sequence(self.embed(data["tokens"]), data["lengths"], batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(x)[0], batch_first=True, total_length=4)[0])


def recurrent(ref, wrong=False):
    def loss(model, data, count):
        return F.cross_entropy(model(data).flatten(0, 1), data["labels"].flatten(), ignore_index=-100, reduction="sum") / count
    if ref is None:
        lengths = torch.tensor([4, 2, 3, 1])
        batch = {"tokens": torch.randint(0, 7, (4, 4)), "lengths": lengths, "labels": torch.randint(0, 7, (4, 4))}
        batch["labels"][torch.arange(4) >= lengths[:, None]] = -100
        model = Recurrent()
        return training(model, lambda: loss(model, batch, lengths.sum()), batch)
    model, data = loaded(Recurrent(), ref), rows(ref.batch)
    count = data["lengths"].sum() * RANKS if wrong else ref.batch["lengths"].sum()
    return training(model, lambda: loss(model, data, count), None, summed(model), whole)


# ---- tables over ranks, rows over ranks, all-to-all between
class Tables(nn.Module):
    def __init__(self, which=range(4)):
        super().__init__()
        self.bags = nn.ModuleDict({str(i): nn.EmbeddingBag(5 + i, 3, mode="sum" if i % 2 else "mean") for i in which})
        self.bottom, self.top = nn.Sequential(nn.Linear(4, 3), nn.PReLU()), nn.Linear(13, 1)

    def pooled(self, ids):
        return torch.stack([bag(ids[:, int(i)]) for i, bag in self.bags.items()], 1)

    def forward(self, dense, pooled):
        z = torch.cat([self.bottom(dense).unsqueeze(1), pooled], 1)
        i, j = torch.tril_indices(5, 5, offset=-1)
        return self.top(torch.cat([z[:, 0], (z @ z.transpose(1, 2))[:, i, j]], 1)).squeeze(1)


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, g):
        return Exchange.forward(ctx, g)


def tables(ref, wrong=False):
    def loss(out, y, n):
        return F.binary_cross_entropy_with_logits(out, y, reduction="sum") / n
    if ref is None:
        model = Tables()
        batch = {"dense": torch.randn(4, 4), "ids": torch.randint(0, 5, (4, 4, 3)), "y": torch.tensor([0.0, 1.0, 1.0, 0.0])}
        return training(model, lambda: loss(model(batch["dense"], model.pooled(batch["ids"])), batch["y"], 4), batch)
    model, data = loaded(Tables(range(2 * dist.get_rank(), 2 * dist.get_rank() + 2)), ref), rows(ref.batch)

    def forward():
        mine = Exchange.apply(model.pooled(ref.batch["ids"]).unflatten(0, (RANKS, -1)))       # my tables, all rows
        return loss(model(data["dense"], torch.cat(list(mine), 1)), data["y"], 2 if wrong else 4)
    return training(model, forward, None, summed(model, skip=["bags"]), whole)


# ---- a selective scan whose channels are split
class Scan(nn.Module):
    def __init__(self, channels=4, split=False, wrong=False):
        super().__init__()
        self.embed, self.split, self.wrong = nn.Embedding(7, 3), split, wrong
        self.inner, self.gate = nn.Linear(3, channels, bias=False), nn.Linear(3, channels, bias=False)
        self.conv, self.select = nn.Conv1d(channels, channels, 2, groups=channels, padding=1), nn.Linear(channels, 4, bias=False)
        self.rates, self.out = nn.Parameter(torch.randn(channels, 2)), nn.Linear(channels, 7, bias=False)

    def forward(self, tokens):
        u = self.embed(tokens)
        u = Sum.apply(u, True) if self.split else u
        n = tokens.shape[1]
        x = F.silu(self.conv(self.inner(u).transpose(1, 2))[..., :n].transpose(1, 2))
        chosen = self.select(x)
        if self.split:
            chosen = Sum.apply(chosen, False)
            chosen = chosen if self.wrong else Sum.apply(chosen, True)
        b, c = chosen.chunk(2, -1)
        decay, h, out = torch.exp(-F.softplus(self.rates)), 0, []
        for t in range(n):
            h = decay * h + x[:, t, :, None] * b[:, t, None]
            out.append((h * c[:, t, None]).sum(-1))
        y = self.out(torch.stack(out, 1) * F.silu(self.gate(u)))
        return Sum.apply(y, False) if self.split else y


def scan(ref, wrong=False):
    def loss(model, batch):
        return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
    if ref is None:
        model, batch = Scan(), {"tokens": torch.randint(0, 7, (2, 3)), "labels": torch.randint(0, 7, (2, 3))}
        return training(model, lambda: loss(model, batch), batch)
    model, rank = Scan(2, True, wrong), dist.get_rank()
    model.load_state_dict({k: v if k == "embed.weight" else v.chunk(RANKS, 1 if k in ("select.weight", "out.weight") else 0)[rank].clone()
                           for k, v in ref.weights.items()})
    return training(model, lambda: loss(model, ref.batch), None)


# ---- a window over a split sequence: the left neighbour's last keys and values come first
class Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.n, rank, found = n, dist.get_rank(), torch.zeros_like(x[:, :n])
        dist.send(x[:, -n:].contiguous(), 1) if rank == 0 else dist.recv(found, 0)
        return torch.cat([found, x], 1)

    @staticmethod
    def backward(ctx, g):
        n, rank, own = ctx.n, dist.get_rank(), g[:, ctx.n:].clone()
        back = torch.zeros_like(g[:, :n])
        dist.recv(back, 1) if rank == 0 else dist.send(g[:, :n].contiguous(), 0)
        own[:, -n:] += back
        return own, None


class Window(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.embed, self.place, self.qkv, self.head, self.size = nn.Embedding(7, 4), nn.Embedding(8, 4), nn.Linear(4, 12), nn.Linear(4, 7), size

    def forward(self, tokens, start=0, halo=0):
        at = torch.arange(start, start + tokens.shape[1])
        q, k, v = self.qkv(self.embed(tokens) + self.place(at)).chunk(3, -1)
        seen = torch.arange(start - halo, start + tokens.shape[1])
        if halo:
            k, v = Halo.apply(k, halo), Halo.apply(v, halo)
        ago = at[:, None] - seen
        mask = (ago >= 0) & (ago < self.size) & (seen >= 0)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def window(ref, wrong=False):
    def loss(out, labels):
        return F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum") / 16
    if ref is None:
        model, batch = Window(), {"tokens": torch.randint(0, 7, (2, 8)), "labels": torch.randint(0, 7, (2, 8))}
        return training(model, lambda: loss(model(batch["tokens"]), batch["labels"]), batch)
    model, start = loaded(Window(), ref), 4 * dist.get_rank()
    tokens, labels = (ref.batch[k][:, start:start + 4] for k in ("tokens", "labels"))
    return training(model, lambda: loss(model(tokens, start, 1 if wrong else 2), labels), None, summed(model), whole)


# ---- a second derivative
def penalty(ref, wrong=False):
    def net():
        return nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1))

    def loss(model, data, n):
        z = data["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        return (model(data["x"]).sum() + 10 * (slope.norm(dim=1) - 1).square().sum()) / n
    if ref is None:
        model, batch = net(), {"x": torch.randn(4, 3)}
        return training(model, lambda: loss(model, batch, 4), batch)
    model, data = loaded(net(), ref), rows(ref.batch)
    return training(model, lambda: loss(model, data, 2 if wrong else 4), None, summed(model), whole)


# ---- experts choose their tokens
class Choosing(nn.Module):
    def __init__(self, experts=range(4), split=False, wrong=False):
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(7, 3), nn.Linear(3, 4, bias=False), nn.Linear(3, 7)
        self.experts = nn.ModuleDict({str(i): nn.Linear(3, 3) for i in experts})
        self.split, self.wrong = split, wrong

    def forward(self, tokens):
        x = self.embed(tokens)
        weights, taken = self.router(x).softmax(-1).t().topk(2, -1)
        u, w = (Sum.apply(x, True), weights if self.wrong else Sum.apply(weights, True)) if self.split else (x, weights)
        out = torch.zeros_like(x)
        for i, expert in self.experts.items():
            at = taken[int(i)]
            out = out.index_add(0, at, expert(u[at]) * w[int(i), :, None])
        return self.head(x + (Sum.apply(out, False) if self.split else out))


def expert_choice(ref, wrong=False):
    if ref is None:
        model, batch = Choosing(), {"tokens": torch.randperm(7)[:6], "labels": torch.randint(0, 7, (6,))}
        return training(model, lambda: F.cross_entropy(model(batch["tokens"]), batch["labels"]), batch)
    model = loaded(Choosing(range(2 * dist.get_rank(), 2 * dist.get_rank() + 2), True, wrong), ref)
    return training(model, lambda: F.cross_entropy(model(ref.batch["tokens"]), ref.batch["labels"]), None)


def reference(how="convolutions"):
    torch.manual_seed(0)
    return globals()[how](None)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
