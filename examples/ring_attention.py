"""Context parallelism over 4 ranks: ring attention, forward and backward, written by hand; optimizer states sharded.

Each rank holds a block of the sequence. Keys and values travel around the ring and meet its queries with an online
softmax; on the way back the gradients of a block travel with it. Every rank steps a part of the parameters (ZeRO-1)
and broadcasts it.
"""
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

import trainverify as tv
from models.llama import IGNORE, Attention, Config, Llama, random_batch, token_loss

RANKS = 4
CONFIG = Config()
MAX_NORM = 0.5


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = random_batch(rows=2, length=12, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


def rotate(block):
    """Pass the block on to the next rank and take the previous rank's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(block)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, block, (rank + 1) % world),
                                    dist.P2POp(dist.irecv, received, (rank - 1) % world)])
    for work in works:
        work.wait()
    return received


def block_scores(q, k, source):
    """Scores of this rank's queries against the keys of rank `source`, causal within the block."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if source == dist.get_rank():
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rotate):
        rank, world = dist.get_rank(), dist.get_world_size()
        kv = torch.stack((k, v))
        for hop in range(world):
            source = (rank - hop) % world                     # whose block is here
            if source <= rank:                                # the others lie in the future
                scores = block_scores(q, kv[0], source)
                largest = scores.amax(-1, keepdim=True)
                if hop == 0:
                    top, weights = largest, (scores - largest).exp()
                    total, out = weights.sum(-1, keepdim=True), weights @ kv[1]
                else:
                    new_top = torch.maximum(top, largest)
                    shrink, weights = (top - new_top).exp(), (scores - new_top).exp()
                    total = total * shrink + weights.sum(-1, keepdim=True)
                    out = out * shrink + weights @ kv[1]
                    top = new_top
            if hop < world - 1:
                kv = rotate(kv)
        out = out / total
        ctx.rotate = rotate
        ctx.save_for_backward(q, k, v, out, top + total.log())
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, logsumexp = ctx.saved_tensors
        rank, world = dist.get_rank(), dist.get_world_size()
        correction = (grad_out * out).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(q)
        block = torch.stack((k, v, torch.zeros_like(k), torch.zeros_like(v)))
        for hop in range(world):
            source = (rank - hop) % world
            if source <= rank:
                k, v, grad_k, grad_v = block
                weights = (block_scores(q, k, source) - logsumexp).exp()
                grad_scores = weights * (grad_out @ v.mT - correction) * q.shape[-1] ** -0.5
                grad_q = grad_q + grad_scores @ k
                block = torch.stack((k, v, grad_k + grad_scores.mT @ q, grad_v + weights.mT @ grad_out))
            block = ctx.rotate(block)                         # after the last hop every block is home
        return grad_q, block[2], block[3], None


class ContextParallelAttention(Attention):
    def __init__(self, config, rotate):
        super().__init__(config)
        self.rotate = rotate

    def attend(self, q, k, v):
        return RingAttention.apply(q, k, v, self.rotate)


def block_positions(length):
    """Where this rank's tokens stand in the whole sequence."""
    return torch.arange(length) + dist.get_rank() * length


def share_updates(parameters):
    """Everyone takes each parameter from the rank whose optimizer stepped it."""
    for i, p in enumerate(parameters):
        dist.broadcast(p.detach(), src=i % RANKS)


def parallel(ref, rotate=rotate, block_positions=block_positions, share_updates=share_updates):
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    model = Llama(CONFIG, attention=partial(ContextParallelAttention, rotate=rotate))
    model.load_state_dict(ref.weights)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters[rank::RANKS], lr=1e-2, weight_decay=0.1)
    tokens, labels = (ref.batch[k].chunk(RANKS, dim=1)[rank] for k in ("tokens", "labels"))

    def step():
        total_tokens = (labels != IGNORE).sum()
        dist.all_reduce(total_tokens)
        logits = model(tokens, block_positions(tokens.shape[1]))
        loss = token_loss(logits, labels, reduction="sum") / total_tokens
        loss.backward()
        for p in parameters:
            dist.all_reduce(p.grad)
        norm = clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        share_updates(parameters)
        model.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step)
