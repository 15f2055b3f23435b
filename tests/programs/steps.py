"""Unusual training steps: closures, optimizers of one's own, steps inside hooks, gradients without any optimizer, second derivatives."""
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trainverify as tv

RANKS = 2
NAMES = ("closure", "functional", "by_hand", "penalty", "average", "value", "item", "master", "hooks")


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))


def nets():
    torch.manual_seed(0)
    return nn.ModuleDict({name: net() for name in NAMES})


class Steps:
    """One training step for each net; `share` makes a rank's loss its share of the mean, `together` sums gradients over ranks."""

    def __init__(self, models, inner, x, y, share=1.0, together=lambda tensors: None, wrong=False):
        self.models, self.inner, self.x, self.y = models, inner, x, y
        self.share, self.together, self.wrong = share, together, wrong
        self.sgd = {name: torch.optim.SGD(models[name].parameters(), lr=0.1) for name in ("closure", "penalty", "average", "value")}
        self.averaged = AveragedModel(inner["average"], multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.momenta = [torch.zeros_like(p) for p in inner["by_hand"].parameters()]
        self.masters = [p.detach().double().clone() for p in inner["master"].parameters()]
        self.count = 0
        for p in inner["hooks"].parameters():
            p.register_post_accumulate_grad_hook(self.step_in_backward)

    def loss(self, name):
        return (self.models[name](self.x) - self.y).square().mean() * self.share

    def closure(self):
        def closure():
            self.sgd["closure"].zero_grad()
            loss = self.loss("closure")
            loss.backward()
            return loss

        return self.sgd["closure"].step(closure)

    def functional(self):
        """No module's backward: torch.func; the optimizer is a line of Python."""
        parameters = {k: v.detach() for k, v in self.inner["functional"].named_parameters()}

        def of(p):
            return (torch.func.functional_call(self.inner["functional"], p, (self.x,)) - self.y).square().mean() * self.share

        grads, loss = torch.func.grad_and_value(of)(parameters)
        self.together(list(grads.values()))
        with torch.no_grad():
            for name, p in self.inner["functional"].named_parameters():
                p.sub_(grads[name], alpha=0.05)
        return loss

    def by_hand(self):
        loss = self.loss("by_hand")
        loss.backward()
        with torch.no_grad():
            for p, m in zip(self.inner["by_hand"].parameters(), self.momenta):
                m.mul_(0.9).add_(p.grad)
                p.data -= 0.1 * (p.grad + 0.9 * m)
                p.grad = None
        return loss

    def penalty(self):
        """The norm of the gradient with respect to the inputs is a part of the loss."""
        x = self.x.clone().requires_grad_()
        out = self.inner["penalty"](x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = ((out - self.y).square().mean() + 0.1 * slope.square().sum(-1).mean()) * self.share
        self.sgd["penalty"].zero_grad()
        loss.backward()
        self.together([p.grad for p in self.inner["penalty"].parameters()])
        self.sgd["penalty"].step()
        return loss

    def average(self):
        self.sgd["average"].zero_grad()
        loss = self.loss("average")
        loss.backward()
        self.sgd["average"].step()
        if not self.wrong:
            self.averaged.update_parameters(self.inner["average"])
        return self.averaged(self.x).square().mean() * self.share

    def value(self):
        """Clipped by value, with a rate that Python computes."""
        self.sgd["value"].param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * self.count / 7))
        loss = self.loss("value")
        self.sgd["value"].zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(self.inner["value"].parameters(), 0.01)
        self.sgd["value"].step()
        return loss

    def item(self):
        """The norm goes through Python."""
        loss = self.loss("item")
        loss.backward()
        parameters = list(self.inner["item"].parameters())
        norm = math.sqrt(sum(p.grad.norm().item() ** 2 for p in parameters))
        factor = min(1.0, 0.05 / (norm + 1e-6))
        with torch.no_grad():
            for p in parameters:
                p -= factor * p.grad
                p.grad.zero_()
        return loss

    def master(self):
        """A master copy in double precision is updated, the model gets what it says."""
        loss = self.loss("master")
        loss.backward()
        for m, p in zip(self.masters, self.inner["master"].parameters()):
            m.add_(p.grad.double(), alpha=-0.1)
            p.data.copy_(m)
            p.grad = None
        return loss

    @torch.no_grad()
    def step_in_backward(self, p):
        self.together([p.grad])
        p.sub_(p.grad, alpha=0.1)
        p.grad = None

    def hooks(self):
        loss = (self.inner["hooks"](self.x) - self.y).square().mean() * self.share
        loss.backward()
        return loss

    def step(self):
        self.count += 1
        return {name: getattr(self, name)() for name in NAMES}


def reference():
    models = nets()
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    return tv.Training(models, Steps(models, models, x, y).step, batch={"x": x, "y": y})


def data_parallel(ref, wrong):
    inner = nets()
    inner.load_state_dict(ref.weights)
    world, rank = dist.get_world_size(), dist.get_rank()

    def together(tensors):
        for t in tensors:
            dist.all_reduce(t, op=dist.ReduceOp.AVG)

    alone = ("functional", "penalty", "hooks")
    models = {name: m if name in alone else DistributedDataParallel(m) for name, m in inner.items()}
    x, y = (ref.batch[k].chunk(world)[rank] for k in ("x", "y"))
    steps = Steps(models, inner, x, y, together=together, wrong=wrong)
    return tv.Training(inner, lambda: {k: tv.local(v) for k, v in steps.step().items()})


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
