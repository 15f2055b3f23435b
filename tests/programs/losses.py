"""Losses: label smoothing, z-loss, ignored labels; whole, over a sharded vocabulary by hand, in chunks of tokens, by torch's other ops."""
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from smallgpt import IGNORE, VOCAB, load, share, training
from smallgpt import reference as plain
from torch import nn

import trainverify as tv

RANKS = 2
SMOOTHING, Z = 0.1, 0.01


def loss_of(logits, labels, reduction="mean"):
    """Cross-entropy with label smoothing plus the z-loss, over the labels that count."""
    logits, labels = logits.flatten(0, -2), labels.flatten()
    z = torch.logsumexp(logits, -1)[labels != IGNORE] ** 2
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=SMOOTHING, reduction=reduction)
    return loss + Z * (z.mean() if reduction == "mean" else z.sum())


def reference():
    made = plain()
    model, batch = made.model, made.batch

    def backward():
        loss = loss_of(model(batch["tokens"]), batch["labels"])
        loss.backward()
        return loss

    return training(model, backward, batch=batch)


def data_parallel(ref, smoothed):
    """Every rank has its rows."""
    model, world = nn.parallel.DistributedDataParallel(load(ref)), dist.get_world_size()
    data = share(ref.batch, world, dist.get_rank())

    def backward():
        total = (data["labels"] != IGNORE).sum()
        dist.all_reduce(total)
        loss = smoothed(model(data["tokens"]), data["labels"]) / total
        (loss * world).backward()
        return tv.local(loss, reduce="sum")

    return training(model, backward)


def rows(ref, wrong):
    return data_parallel(ref, lambda logits, labels: loss_of(logits, labels, reduction="mean" if wrong else "sum"))


def by_hand(ref, wrong):
    """log-softmax, gather and masks instead of cross_entropy."""
    def smoothed(logits, labels):
        logits, labels = logits.float().flatten(0, -2), labels.flatten()
        valid = labels != IGNORE
        logp = torch.log_softmax(logits, -1)
        nll = -logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        smooth = -logp.sum(-1) / (VOCAB - 1 if wrong else VOCAB)
        z = logits.exp().sum(-1).log().square()
        return (((1 - SMOOTHING) * nll + SMOOTHING * smooth + Z * z) * valid).sum()

    return data_parallel(ref, smoothed)


class Sum(torch.autograd.Function):
    """A sum over the ranks whose gradient every rank has already."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class VocabHead(nn.Module):
    """This rank's part of the head; 13 words over 2 ranks are uneven."""

    def __init__(self, weight, start):
        super().__init__()
        self.weight, self.start = nn.Parameter(weight.clone()), start

    def forward(self, x):
        return F.linear(Copy.apply(x), self.weight)


def vocabulary(ref, wrong):
    """A head sharded by words: maxima, sums of exponentials and target logits are combined over the ranks."""
    model, rank, world = load(ref), dist.get_rank(), dist.get_world_size()
    parts = ref.weights["head.weight"].tensor_split(world)
    model.head = VocabHead(parts[rank], sum(len(p) for p in parts[:rank]))

    def smoothed(logits, labels):
        logits, labels = logits.flatten(0, -2), labels.flatten()
        valid = labels != IGNORE
        top = logits.detach().max(-1).values
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        logits = logits - top[:, None]
        total = Sum.apply(logits.exp().sum(-1))
        own = labels - model.head.start
        mine = (own >= 0) & (own < logits.shape[1])
        target = Sum.apply(logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1) * mine)
        mean = Sum.apply(logits.sum(-1)) / VOCAB
        lse = total.log()
        nll, smooth, z = lse - target, lse - mean, (lse if wrong else lse + top) ** 2
        return (((1 - SMOOTHING) * nll + SMOOTHING * smooth + Z * z) * valid).sum() / valid.sum()

    def backward():
        loss = smoothed(model(ref.batch["tokens"]), ref.batch["labels"])
        loss.backward()
        return loss

    def clip(parameters):
        square = model.head.weight.grad.square().sum()
        dist.all_reduce(square)
        rest = [p for p in parameters if p is not model.head.weight]
        norm = (square + nn.utils.get_total_norm([p.grad for p in rest]) ** 2).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, 0.1, norm)
        return norm

    return training(model, backward, clip=clip)


def chunked(ref, wrong):
    """The head and the loss token chunk by token chunk, recomputed in the backward: the logits never exist as a whole."""
    from torch.utils.checkpoint import checkpoint
    model, data = load(ref), ref.batch
    head, model.head = model.head, nn.Identity()
    model.add_module("lm_head", head)

    def one(x, labels):
        return loss_of(head(x), labels, reduction="sum")

    def backward():
        x, labels = model(data["tokens"]).flatten(0, 1), data["labels"].flatten()
        total = (labels != IGNORE).sum()
        loss = sum(checkpoint(one, a, b, use_reentrant=False) for a, b in zip(x.split(20), labels.split(20))) / (total + wrong)
        loss.backward()
        return loss

    return training(model, backward)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
