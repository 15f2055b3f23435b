"""Megatron-LM commit 3479e6fb26: linear layers add their weight's gradient to main_grad themselves and return a dummy made by
torch.empty. For a tied embedding the hook must add what autograd brings, because the lookup's gradient comes that way, and with
it came the uninitialised dummy. The fix makes the dummy of such weights with zeros."""
import torch
import torch.distributed as dist
from kit import Net, load, loss_of, rows_of, single, total, training, valid
from torch import nn

RANKS = 2
BUG = {"id": "G6", "link": "https://github.com/NVIDIA/Megatron-LM/commit/3479e6fb26", "diagnosis": "uninitialised", "unknown": "uninitialised memory",
       "line": "dummy = torch.empty_like(weight)", "also": ["p.main_grad.add_(p.grad)"]}


def reference():
    return single(lambda: Net(tied=True))


class FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, zero_dummy):
        ctx.save_for_backward(x, weight)
        ctx.zero_dummy = zero_dummy
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(grad.flatten(0, 1).T @ x.flatten(0, 1))
        if ctx.zero_dummy:
            dummy = torch.zeros_like(weight)
        else:
            dummy = torch.empty_like(weight)
        return grad @ weight, dummy, None


class Head(nn.Module):
    def __init__(self, weight, fixed):
        super().__init__()
        self.weight, self.fixed = weight, fixed

    def forward(self, x):
        return FusedLinear.apply(x, self.weight, self.fixed)


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(tied=True), ref.weights)
    model.head = Head(model.embed.weight, fixed)
    parameters = list(model.parameters())
    tokens, labels = rows_of(ref.batch, None)

    def accumulate(p):
        p.main_grad.add_(p.grad)
        p.grad = None

    for p in parameters:
        p.main_grad = torch.zeros_like(p)
        p.register_post_accumulate_grad_hook(accumulate)

    def backward():
        for p in parameters:
            p.main_grad.zero_()
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        for p in parameters:
            dist.all_reduce(p.main_grad)
            p.grad = p.main_grad.clone()
        return total(loss)

    return training(model, backward)
