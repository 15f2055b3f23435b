"""Megatron-LM PR 3693 (issue 3670): with overlapped reduction the gradients were used before the communication that brings them
together was known to be complete; results changed from run to run. Here one of two buckets is not waited for."""
import torch
import torch.distributed as dist
from kit import Net, load, loss_of, rows_of, single, total, training, valid

RANKS = 3
BUG = {"id": "G11", "link": "https://github.com/NVIDIA/Megatron-LM/pull/3693", "diagnosis": "uninitialised",
       "line": "p.grad = p.main_grad.clone()", "also": ["bucket.handle = dist.all_reduce("]}
reference = single


class Bucket:
    """Gradients in one buffer, whose reduction starts when the last of them is there."""

    def __init__(self, parameters):
        self.parameters, self.handle, self.missing = parameters, None, len(parameters)
        self.flat = torch.zeros(sum(p.numel() for p in parameters))
        for p, view in zip(parameters, self.flat.split([p.numel() for p in parameters])):
            p.main_grad, p.bucket = view.view_as(p), self


def hook(p):
    p.main_grad.copy_(p.grad)
    bucket = p.bucket
    bucket.missing -= 1
    if not bucket.missing:
        bucket.handle = dist.all_reduce(bucket.flat, async_op=True)


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    parameters = list(model.parameters())
    buckets = [Bucket(parameters[:3]), Bucket(parameters[3:])]
    for p in parameters:
        p.register_post_accumulate_grad_hook(hook)
    tokens, labels = rows_of(ref.batch, None)

    def finish_grad_sync():
        for bucket in buckets if fixed else buckets[:1]:
            bucket.handle.wait()

    def backward():
        for bucket in buckets:
            bucket.missing = len(bucket.parameters)
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        finish_grad_sync()
        for p in parameters:
            p.grad = p.main_grad.clone()
        return total(loss)

    return training(model, backward)
