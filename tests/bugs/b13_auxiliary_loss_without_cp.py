"""Megatron-LM pull request 2237: each context-parallel rank adds its share of the router's auxiliary loss. Gradients are averaged over data- and
context-parallel ranks, for which the main loss counts once per context-parallel rank; the auxiliary one did not."""
import torch
from kit import Moe, Net, cp_shares, load, loss_of, mean_grads, mesh_of, single, total, training, valid

RANKS = 6
BUG = {"id": "B13", "link": "https://github.com/NVIDIA/Megatron-LM/pull/2237", "diagnosis": "additive term",
       "line": "scores = AutoScaler.apply(", "also": ["dist.all_reduce(p.grad, group=group)", "p.grad /= dist.get_world_size(group)", "logits = self.router(x)",
                                            "z = logits.logsumexp(-1)", "auxiliary = COEFFICIENT"],
       "missed": ["diagnosis"]}
COEFFICIENT = 0.5


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
    """Adds the share that its own tokens have in the mean over the tokens of all context-parallel ranks."""

    def __init__(self, cp=None):
        super().__init__()
        self.ranks = cp.size() if cp else 1

    def route(self, x):
        logits = self.router(x)
        z = logits.logsumexp(-1)
        auxiliary = COEFFICIENT * z.square().sum() / (z.numel() * self.ranks)
        scores = AutoScaler.apply(logits.softmax(-1), auxiliary)
        return scores, torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0)


def reference():
    return single(lambda: Net(mlp=AuxiliaryMoe))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp, everyone = mesh.get_group("dp"), mesh.get_group("cp"), mesh._flatten("dp_cp").get_group()
    model = load(Net(mlp=lambda: AuxiliaryMoe(cp)), ref.weights)
    tokens, labels = cp_shares(ref.batch, dp, cp)
    AutoScaler.scale = float(cp.size()) if fixed else 1.0

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), everyone)
        (loss * mesh.size()).backward()
        mean_grads(model.parameters(), everyone)
        return total(loss, everyone)

    return training(model, backward)
