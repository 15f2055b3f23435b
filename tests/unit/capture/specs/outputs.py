"""What is compared: programs that differ in how they hold, step and report things."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv

RANKS = 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight   # tied
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        return self.head(self.norm(x @ self.embed.weight))


def build(state=None, batch=None, lr=0.1):
    net = Net()
    if state is not None:
        net.load_state_dict(state)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    data = batch or {"x": torch.rand(6, 5), "mask": torch.tensor([1.0, 0, 1, 1, 0, 1]), "kept": tv.fixed(torch.rand(2)), "y": torch.arange(6) % 5,
                     "names": ["a", None, 3, 2.5]}
    return net, optimizer, data


def loss_of(net, data):
    return (F.cross_entropy(net(data["x"]), data["y"], reduction="none") * data["mask"]).sum()


def step_of(net, optimizer, data, report):
    def step():
        loss = loss_of(net, data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return report(loss)
    return step


def reference():
    net, optimizer, data = build()
    return tv.Training(net, step_of(net, optimizer, data, lambda loss: {"loss": loss, "double": loss.item() * 2, "lr": 0.1, "nothing": None}), batch=data)


def plain(ref):
    net, optimizer, data = build(ref.weights, ref.batch)
    assert ref.weights["embed.weight"] is ref.weights["head.weight"] and data["names"] == ["a", None, 3, 2.5]
    group = dist.new_group([0, 1])

    def report(loss):
        return {"loss": tv.local(loss, reduce="sum", group=group), "double": tv.local(loss.item() * 2), "one": loss.reshape(1)}
    return tv.Training(net, step_of(net, optimizer, data, report))


def late(ref):
    """Parameters that are right only after finish()."""
    net, optimizer, data = build(ref.weights, ref.batch)
    training = tv.Training(net, step_of(net, optimizer, data, lambda loss: None), finish=lambda: net.unused.data.add_(1))
    return training


def gathered_in_the_forward(ref):
    """A parameter that is behind after each step, and completed by the next forward (finish(), after the last one)."""
    net, optimizer, data = build(ref.weights, ref.batch)
    behind = []

    def catch_up():
        if behind:
            net.unused.data.add_(behind.pop())

    net.register_forward_pre_hook(lambda module, args: catch_up())
    one = step_of(net, optimizer, data, lambda loss: None)

    def step():
        one()
        behind.append(3)

    return tv.Training(net, step, finish=catch_up)


def changed_by_a_hook(ref):
    """The optimizer's own hook changes gradients after the global ones have run."""
    net, optimizer, data = build(ref.weights, ref.batch)

    def double(opt, args, kwargs):
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(2)
    optimizer.register_step_pre_hook(double)
    return tv.Training(net, step_of(net, optimizer, data, lambda loss: None))


def twice(ref):
    """Two optimizer steps in one step."""
    net, optimizer, data = build(ref.weights, ref.batch)
    one = step_of(net, optimizer, data, lambda loss: None)
    return tv.Training(net, lambda: (one(), one()) and None)


def by_hand(ref):
    net, _, data = build(ref.weights, ref.batch)

    def step():
        loss_of(net, data).backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
    return tv.Training([net], step)


def chunks(ref):
    net, optimizer, data = build(ref.weights, ref.batch)
    a, b = Net(), nn.Linear(2, 2)
    return tv.Training([net, a, b], step_of(net, optimizer, data, lambda loss: None))


# ---- what a user gets wrong
def not_a_training(ref):
    return Net()


def no_model(ref):
    return tv.Training("model", lambda: None)


def wrong_report(ref):
    return tv.Training(Net(), lambda: {"loss": torch.zeros(2)})


def wrong_value(ref):
    return tv.Training(Net(), lambda: {"loss": "high"})


def wrong_return(ref):
    return tv.Training(Net(), lambda: 3.0)


def sparse(ref):
    net = nn.Embedding(5, 4, sparse=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step():
        net(torch.tensor([1])).sum().backward()
        optimizer.step()
    return tv.Training(net, step)


def raises(ref):
    raise ValueError("tp must divide heads")


def parallel(ref, how):
    return globals()[how](ref)
