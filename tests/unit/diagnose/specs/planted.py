"""A tiny model on two ranks to plant bugs in: tensor parallel by hand (how=sharded), data parallel with two microbatches (accumulated), and the first with
a sum that is missing (wrong)."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv

RANKS = 2
LR = 0.1
ROWS, WIDTH, HIDDEN, CLASSES, IGNORE = 8, 3, 4, 5, -100


class Net(nn.Module):
    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, x):
        return F.linear(self.up(x).tanh(), self.down.weight), self.down.bias


def loss_of(logits, labels):
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def training(model, gradients, batch=None):
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1, fused=True)

    def step():
        loss = gradients()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    return tv.Training(model, step, batch=batch)


def reference():
    torch.manual_seed(0)
    model = Net()
    batch = {"x": torch.randn(ROWS, WIDTH), "labels": torch.tensor([0, IGNORE, 2, 3, 1, 4, IGNORE, IGNORE])}

    def gradients():
        out, bias = model(batch["x"])
        loss = loss_of(out + bias, batch["labels"]) / (batch["labels"] != IGNORE).sum()
        loss.backward()
        return loss

    return training(model, gradients, batch)


def sharded(ref, reduce=True):
    rank, part = dist.get_rank(), HIDDEN // RANKS
    model = Net(part)
    own = slice(rank * part, (rank + 1) * part)
    w = ref.weights
    model.load_state_dict({"up.weight": w["up.weight"][own], "up.bias": w["up.bias"][own], "down.weight": w["down.weight"][:, own], "down.bias": w["down.bias"]})
    labels = ref.batch["labels"]

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x = x.clone()
            if reduce:
                dist.all_reduce(x)
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad

    def gradients():
        out, bias = model(ref.batch["x"])
        loss = loss_of(Sum.apply(out) + bias, labels) / (labels != IGNORE).sum()
        loss.backward()
        return loss

    return training(model, gradients)


def accumulated(ref):
    model, total = Net(), (ref.batch["labels"] != IGNORE).sum()
    model.load_state_dict(ref.weights)
    x, labels = (ref.batch[k].chunk(RANKS)[dist.get_rank()] for k in ("x", "labels"))

    def gradients():
        share = torch.zeros(())
        for a, b in zip(x.chunk(2), labels.chunk(2)):
            out, bias = model(a)
            loss = loss_of(out + bias, b) / total
            loss.backward()
            share += loss.detach()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        dist.all_reduce(share)
        return share

    return training(model, gradients)


def parallel(ref, how="sharded"):
    dist.init_process_group("gloo")
    return accumulated(ref) if how == "accumulated" else sharded(ref, reduce=how != "wrong")
