"""TrainVerify's collection, bug 14 (github.com/verify-llm/TrainVerify): the reducer of the data-parallel gradients was launched before the
last operation of the second microbatch. What that operation adds stays on its rank."""
import torch
import torch.distributed as dist
from kit import Net, load, loss_of, make_batch, rows_of, single, total, training, valid

RANKS = 3
MICROBATCHES = 2
BUG = {"id": "G7", "link": "https://github.com/verify-llm/TrainVerify", "diagnosis": "partial sum",
       "line": "dist.all_reduce(self.flat)", "also": ["p.main_grad.add_(p.grad)", "p.grad = p.main_grad.clone()"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


class Reducer:
    """One bucket for all gradients. Hooks count the gradients of the last microbatch; the bucket is reduced when enough are in."""

    def __init__(self, model, enough):
        self.parameters, self.enough = list(model.parameters()), enough
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters))
        for p, view in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            p.main_grad = view.view_as(p)
            p.register_post_accumulate_grad_hook(self.ready)
        self.start(last=False)

    def start(self, last):
        self.last, self.count = last, 0

    def ready(self, p):
        p.main_grad.add_(p.grad)
        p.grad = None
        self.count += 1
        if self.last and self.count == self.enough:
            dist.all_reduce(self.flat)

    def hand_over(self):
        for p in self.parameters:
            p.grad = p.main_grad.clone()
        self.flat.zero_()


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    n = len(list(model.parameters()))
    reducer = Reducer(model, enough=n if fixed else n - 1)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        num_tokens, losses = total(valid(labels)), 0.0
        for i, (inputs, target) in enumerate(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES))):
            reducer.start(last=i == MICROBATCHES - 1)
            loss = loss_of(model(inputs), target, "sum") / num_tokens
            loss.backward()
            losses = losses + loss.detach()
        reducer.hand_over()
        return total(losses)

    return training(model, backward)
