"""Megatron-LM issue 775: without overlap, finish_grad_sync starts the reduction itself and waits for it. The end of the backward called
start_grad_sync as well, so that every bucket was reduced twice."""
import torch
import torch.distributed as dist
from kit import Net, load, loss_of, make_batch, rows_of, single, total, training, valid

RANKS = 3
MICROBATCHES = 2
BUG = {"id": "G14", "link": "https://github.com/NVIDIA/Megatron-LM/issues/775", "diagnosis": "multiple",
       "line": "dist.all_reduce(self.flat)", "also": ["p.grad = p.main_grad.clone()"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


class GradBuffer:
    def __init__(self, parameters):
        self.parameters, self.flat = parameters, torch.zeros(sum(p.numel() for p in parameters))
        for p, view in zip(parameters, self.flat.split([p.numel() for p in parameters])):
            p.main_grad = view.view_as(p)
            p.register_post_accumulate_grad_hook(self.accumulate)

    @staticmethod
    def accumulate(p):
        p.main_grad.add_(p.grad)
        p.grad = None

    def start_grad_sync(self):
        dist.all_reduce(self.flat)

    def finish_grad_sync(self, overlap=False):
        if not overlap:
            self.start_grad_sync()


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    buffer = GradBuffer(list(model.parameters()))
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        buffer.flat.zero_()
        num_tokens, losses = total(valid(labels)), 0.0
        for inputs, target in zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)):
            loss = loss_of(model(inputs), target, "sum") / num_tokens
            loss.backward()
            losses = losses + loss.detach()
        if not fixed:
            buffer.start_grad_sync()
        buffer.finish_grad_sync()
        for p in buffer.parameters:
            p.grad = p.main_grad.clone()
        return total(losses)

    return training(model, backward)
