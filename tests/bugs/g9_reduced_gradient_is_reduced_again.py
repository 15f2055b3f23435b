"""ColossalAI issue 247: with accumulation each backward reduced the gradient that had been accumulated so far over the ranks, also what
earlier microbatches had left there already reduced: these count once per rank for every later microbatch."""
import torch.distributed as dist
from kit import Net, load, loss_of, make_batch, rows_of, single, total, training, valid

RANKS = 2
MICROBATCHES = 3
BUG = {"id": "G9", "link": "https://github.com/hpcaitech/ColossalAI/issues/247", "diagnosis": "reweighted",
       "line": "dist.all_reduce(p.grad)", "also": ["loss.backward()"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


class Engine:
    """Reduces in a hook when a gradient is there, as ZeRO does, in every microbatch or (fixed) in the last one."""

    def __init__(self, model, fixed):
        self.fixed, self.last = fixed, False
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.reduce)

    def reduce(self, p):
        if self.last or not self.fixed:
            dist.all_reduce(p.grad)


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    engine = Engine(model, fixed)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        num_tokens, losses = total(valid(labels)), 0.0
        for i, (inputs, target) in enumerate(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES))):
            engine.last = i == MICROBATCHES - 1
            loss = loss_of(model(inputs), target, "sum") / num_tokens
            loss.backward()
            losses = losses + loss.detach()
        return total(losses)

    return training(model, backward)
