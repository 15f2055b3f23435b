"""mlx-lm PR 1413: gradients of the token mean of each batch were added up and divided by the number of accumulated batches, then
averaged over the ranks. The fix adds gradients of sums, and divides by the tokens of all of them."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit import IGNORE, Net, load, make_batch, rows_of, single, total, training, valid

RANKS = 3
K = 2
BUG = {"id": "C8", "link": "https://github.com/ml-explore/mlx-lm/pull/1413", "diagnosis": "reweighted",
       "line": "loss = F.cross_entropy(logits", "also": ["p.grad = total(g / K) / RANKS"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    parameters = list(model.parameters())
    tokens, labels = rows_of(ref.batch, None)

    def loss_and_grads(inputs, target):
        logits = model(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORE, reduction="sum" if fixed else "mean")
        return loss.detach(), torch.autograd.grad(loss, parameters)

    def backward():
        losses, grads = 0.0, [torch.zeros_like(p) for p in parameters]
        for inputs, target in zip(tokens.chunk(K), labels.chunk(K)):
            loss, new = loss_and_grads(inputs, target)
            losses, grads = losses + loss, [g + n for g, n in zip(grads, new)]
        if fixed:
            n = total(valid(labels))
            for p, g in zip(parameters, grads):
                p.grad = total(g) / n
            return total(losses) / n
        for p, g in zip(parameters, grads):
            p.grad = total(g / K) / RANKS
        return total(losses / K) / RANKS

    return training(model, backward)
