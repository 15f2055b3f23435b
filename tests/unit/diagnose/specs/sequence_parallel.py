"""Tensor and sequence parallel: a column- and a row-parallel layer between a gather and a reduce-scatter of the sequence, and data that stands
in another order; the last rank's share of the loss is kept for a look at partial and scaled values."""
import torch
import torch.distributed as dist
from torch import nn

import trainverify as tv

RANKS = 2
BATCH, SEQUENCE, WIDTH = 3, 4, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 8, bias=False)
        self.down = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x):
        return self.down(self.up(x).tanh())


class Gather(torch.autograd.Function):
    """The whole sequence from every rank's part; its gradient is summed and scattered."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(SEQUENCE, *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        return scattered(grad)


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return scattered(x)

    @staticmethod
    def backward(ctx, grad):
        return Gather.forward(ctx, grad)


def scattered(x):
    out = x.new_empty(x.shape[0] // RANKS, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous())
    return out


class Sharded(nn.Module):
    def __init__(self, ref):
        super().__init__()
        me = dist.get_rank()
        self.up = nn.Parameter(ref.weights["up.weight"].chunk(RANKS)[me].clone())
        self.down = nn.Parameter(ref.weights["down.weight"].chunk(RANKS, 1)[me].clone())

    def forward(self, x):
        mine = x.transpose(0, 1).chunk(RANKS)[dist.get_rank()].contiguous()
        hidden = nn.functional.linear(Gather.apply(mine), self.up).tanh()
        return Scatter.apply(nn.functional.linear(hidden, self.down))


def training(model, data, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = loss_of(model(data["x"]))
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch=data)


def reference():
    torch.manual_seed(0)
    return training(Net(), {"x": torch.randn(BATCH, SEQUENCE, WIDTH)}, lambda out: out.pow(2).sum() / 5)


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def parallel(ref):
    dist.init_process_group("gloo")
    return training(Sharded(ref), ref.batch, lambda out: Total.apply(3 * out.pow(2).sum()) / 15)
