"""Row-parallel linear layer whose bias every rank adds before the sum: it counts twice."""
import torch
import torch.distributed as dist
from torch import nn

import trainverify as tv

RANKS = 2
WIDTH = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.down(self.up(x).tanh())


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Sharded(Net):
    def forward(self, x):
        part = slice(dist.get_rank() * WIDTH // RANKS, (dist.get_rank() + 1) * WIDTH // RANKS)
        hidden = nn.functional.linear(x, self.up.weight[part], self.up.bias[part]).tanh()
        return Sum.apply(nn.functional.linear(hidden, self.down.weight[:, part], self.down.bias))


def training(model, data):
    def step():
        loss = model(data["x"]).pow(2).sum()
        loss.backward()
        return {"loss": loss}
    return tv.Training(model, step, batch=data)


def reference():
    torch.manual_seed(0)
    return training(Net(), {"x": torch.randn(3, WIDTH)})


def parallel(ref):
    dist.init_process_group("gloo")
    model = Sharded()
    model.load_state_dict(ref.weights)
    return training(model, ref.batch)
