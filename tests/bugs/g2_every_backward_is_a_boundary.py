"""open-instruct PR 1498: microbatches were accumulated by hand while DeepSpeed was told of one per step, so every backward counted as the
last. ZeRO-2 then takes the gradients for the update from its accumulator and empties it: only the last microbatch survives.
(ZeRO-3 counts microbatches up to the step and was right.)"""
import torch
import torch.distributed as dist
from kit import MAX_NORM, Net, adamw, load, loss_of, make_batch, rows_of, single, total, training, valid

RANKS = 3
MICROBATCHES = 2
BUG = {"id": "G2", "link": "https://github.com/allenai/open-instruct/pull/1498", "diagnosis": "additive term",
       "missed": ["line"], "line": "self.averaged_gradients = self.all_grad_tensors", "also": ["p.grad = ", "norm = total("]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


class Zero2:
    """Each rank owns some parameters: it gets the sum of their gradients over the ranks after every backward, and updates them."""

    def __init__(self, model):
        self.parameters, self.rank = list(model.parameters()), dist.get_rank()
        self.own = self.parameters[self.rank::RANKS]
        self.optimizer = adamw(self.own)
        self.all_grad_tensors, self.averaged_gradients, self.is_boundary = None, None, True

    def backward(self, loss):
        loss.backward()
        reduced = []
        for i, p in enumerate(self.parameters):
            dist.reduce(p.grad, i % RANKS)
            if i % RANKS == self.rank:
                reduced.append(p.grad.clone())
            p.grad = None
        self.epilogue(reduced)

    def epilogue(self, reduced):
        if self.all_grad_tensors is None:
            self.all_grad_tensors = reduced
        else:
            torch._foreach_add_(self.all_grad_tensors, reduced)
        if self.is_boundary:
            self.averaged_gradients = self.all_grad_tensors
            self.all_grad_tensors = None

    def clip(self, _):
        norm = total(sum(g.square().sum() for g in self.averaged_gradients)).sqrt()
        torch._foreach_mul_(self.averaged_gradients, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self):
        for p, g in zip(self.own, self.averaged_gradients):
            p.grad = g
        self.optimizer.step()
        for i, p in enumerate(self.parameters):
            dist.broadcast(p.data, i % RANKS)

    def zero_grad(self):
        self.averaged_gradients = None
        for p in self.own:
            p.grad = None


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    engine = Zero2(model)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        num_tokens, losses = total(valid(labels)), 0.0
        for i, (inputs, target) in enumerate(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES))):
            if fixed:
                engine.is_boundary = i == MICROBATCHES - 1
            loss = loss_of(model(inputs), target, "sum") / num_tokens
            engine.backward(loss)
            losses = losses + loss.detach()
        return total(losses)

    return training(model, backward, engine, engine.clip)
