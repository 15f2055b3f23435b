"""Context parallelism: every rank has a part of each sequence. torch's ring attention, and Ulysses' all-to-all over heads by hand."""
import torch
import torch.distributed as dist
from smallgpt import HEADS, IGNORE, Attention, load, loss_of, reference, training  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_to_all_single

import trainverify as tv

RANKS = lambda how, wrong=False: 3 if how.startswith("ring") else 2  # noqa: E731


def summed(model, backward):
    """The step of one rank: its gradients are its share of the sum."""
    def whole():
        loss = backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return tv.local(loss, reduce="sum")

    return training(model, whole)


def ring(ref, wrong, rotate):
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    set_rotate_method(rotate)
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), load(ref)
    total = (ref.batch["labels"] != IGNORE).sum()

    def backward():
        tokens, labels = ref.batch["tokens"].clone(), ref.batch["labels"].clone()
        positions = torch.arange(tokens.shape[1])
        buffers = [tokens, labels] if wrong else [tokens, labels, positions]
        dims = [1, 1, 0][: len(buffers)]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers=set(buffers)):
            loss = loss_of(model(tokens, positions[: tokens.shape[1]]), labels, reduction="sum") / total
            loss.backward()
        return loss

    return summed(model, backward)


def ring_allgather(ref, wrong):
    return ring(ref, wrong, "allgather")


def ring_alltoall(ref, wrong):
    return ring(ref, wrong, "alltoall")


def exchange(x):
    """The first dimension cut over the ranks, and each rank's pieces put together along a new first dimension."""
    x = x.contiguous()
    return all_to_all_single(torch.empty_like(x), x)


class Ulysses(Attention):
    wrong = False

    def attend(self, q, k, v):
        n = dist.get_world_size()
        q, k, v = (self.to_heads(t, n) for t in (q, k, v))
        out = super().attend(q, k, v)                                                # (batch, heads / n, length, dim)
        parts = exchange(torch.stack(out.chunk(n, 2)))                               # of every rank's heads, this rank's positions
        return torch.cat((parts.flip(0) if self.wrong else parts).unbind(), 1)

    @staticmethod
    def to_heads(t, n):
        """(batch, heads, length / n, dim) -> (batch, heads / n, length, dim)"""
        return torch.cat(exchange(torch.stack(t.chunk(n, 1))).unbind(), 2)


def ulysses(ref, wrong):
    Ulysses.wrong = wrong
    model, n, rank = load(ref, attention=Ulysses), dist.get_world_size(), dist.get_rank()
    total = (ref.batch["labels"] != IGNORE).sum()
    tokens, labels = (ref.batch[k].chunk(n, 1)[rank] for k in ("tokens", "labels"))
    positions = torch.arange(ref.batch["tokens"].shape[1]).chunk(n)[rank]

    def backward():
        loss = loss_of(model(tokens, positions), labels, reduction="sum") / total
        loss.backward()
        return loss

    return summed(model, backward)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
