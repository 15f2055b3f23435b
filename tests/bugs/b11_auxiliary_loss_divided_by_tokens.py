"""Megatron-LM commit 87d9d2506a: with a loss per token all gradients are divided by the number of tokens at the end of the step. The
auxiliary loss of the router, a mean that enters in the backward on its own, is divided with them."""
import torch
from kit import Moe, Net, load, loss_of, make_batch, mesh_of, rows_of, single, sum_grads, total, training, valid

RANKS = 3
BUG = {"id": "B11", "link": "https://github.com/NVIDIA/Megatron-LM/commit/87d9d2506a", "diagnosis": "additive term",
       "line": "p.grad /= tokens", "also": ["dist.all_reduce(p.grad, group=group)", "logits = self.router(x)", "z.square().mean()"],
       "missed": ["line", "diagnosis"]}
COEFFICIENT, MICROBATCHES = 0.5, 2


class AutoScaler(torch.autograd.Function):
    """Lets a loss enter in the backward of a value that it does not change."""

    scale = 1.0

    @staticmethod
    def forward(ctx, value, loss):
        ctx.save_for_backward(loss)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.saved_tensors[0]) * AutoScaler.scale


class AuxiliaryMoe(Moe):
    def route(self, x):
        logits = self.router(x)
        z = logits.logsumexp(-1)
        scores = AutoScaler.apply(logits.softmax(-1), COEFFICIENT * z.square().mean())
        return scores, torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0)


def reference():
    return single(lambda: Net(mlp=AuxiliaryMoe), batch=make_batch(12, 10))


def parallel(ref, fixed=False):
    mesh_of(dp=3)
    model = load(Net(mlp=AuxiliaryMoe), ref.weights)
    parts = list(zip(*(t.chunk(MICROBATCHES) for t in rows_of(ref.batch, None))))

    def backward():
        tokens = total(sum(valid(labels) for _, labels in parts))
        AutoScaler.scale = (tokens if fixed else 1) / (MICROBATCHES * RANKS)
        losses = []
        for inputs, labels in parts:
            losses.append(loss_of(model(inputs), labels, "sum"))
            losses[-1].backward()
        sum_grads(model.parameters(), None)
        for p in model.parameters():
            p.grad /= tokens
        return total(sum(losses)) / tokens

    return training(model, backward)
