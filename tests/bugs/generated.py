"""Correct programs at random: a random small model, and a random valid way to train it on several ranks. None of them may alarm.

`program(seed)` gives the two functions that `tv.verify` takes, the number of ranks, and words that describe the program.
"""
import random
from contextlib import nullcontext
from dataclasses import dataclass

import kit
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

MODES = ("tp", "sp", "cp", "ulysses", "ep", "pp", "ddp", "fsdp1", "fsdp2", "buffers")
DEGREES = {"tp": (2, 3), "sp": (2, 3), "cp": (2, 3), "ulysses": (2, 3), "ep": (2, 3), "pp": (2, 3)}


@dataclass(frozen=True)
class Choices:
    """One program. n: the degree of its mode; dp: of data parallelism beside it (for ep: of the experts' replicas)."""

    mode: str
    n: int
    dp: int
    layers: int
    attention: bool
    moe: bool
    norm: type
    tied: bool
    recompute: bool
    microbatches: int
    averaged: bool                            # gradients are averaged and losses count world times; or they are summed
    optimizer: str
    clip: bool
    rows: int
    length: int

    @property
    def ranks(self):
        return self.n * self.dp


def choose(seed):
    r = random.Random(seed)
    mode = MODES[seed % len(MODES)]
    n = r.choice(DEGREES.get(mode, (1,)))
    dp = 1 if mode == "pp" else r.choice((1, 2, 3) if n == 2 else (1, 2)) if n > 1 else r.choice((2, 3))
    attention = mode in ("cp", "ulysses") or (mode not in ("sp", "pp") and r.random() < 0.5)
    microbatches = r.choice((1, 2, 3)) if mode != "pp" else r.choice((n, n + 1))
    shares = dp * (n if mode == "ep" else 1)
    return Choices(mode, n, dp, n if mode == "pp" else r.choice((1, 2)), attention, mode == "ep" or (mode in ("ddp", "cp") and r.random() < 0.4),
                   r.choice((nn.LayerNorm, nn.RMSNorm)), mode not in ("pp", "fsdp1") and r.random() < 0.3, r.random() < 0.3, microbatches,
                   mode in ("ddp", "fsdp1", "fsdp2") or r.random() < 0.5, r.choice(("adamw", "sgd", "adam")), r.random() < 0.7,
                   shares * microbatches * r.choice((1, 2)), 12)


class Recomputed(kit.Block):
    """Its activations are computed again in the backward."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def net(c, cls=kit.Net, mlp=None, attention=None, *args):
    mlp = mlp or (kit.Moe if c.moe else kit.Mlp)
    attention = attention or (kit.Attention if c.attention else None)
    model = cls(*args, mlp=mlp, norm=c.norm, attention=attention, layers=c.layers, tied=c.tied)
    for layer in model.layers if c.recompute else ():
        layer.__class__ = Recomputed
    return model


def optimizer_of(c, parameters):
    if c.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, fused=c.mode != "fsdp2")
    if c.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)
    return kit.adamw(parameters)


class Ulysses(kit.Attention):
    """The whole sequence of this rank's heads, between two exchanges."""

    def __init__(self, sp):
        super().__init__()
        self.sp = sp

    def attend(self, q, k, v):
        q, k, v = (kit.AllToAll.apply(t, self.sp, 1, 2) for t in (q, k, v))
        return kit.AllToAll.apply(super().attend(q, k, v), self.sp, 2, 1)


def reference_of(c):
    def reference():
        batch = kit.make_batch(c.rows, c.length)
        torch.manual_seed(0)
        model = net(c)

        def backward():
            loss = kit.loss_of(model(batch["tokens"]), batch["labels"])
            loss.backward()
            return loss

        return kit.training(model, backward, optimizer_of(c, model.parameters()), kit.clip if c.clip else None, batch)

    return reference


def accumulate(c, model, tokens, labels, everyone, last=lambda yes: nullcontext()):
    """Backwards of all microbatches; returns this rank's share of the loss."""
    count, share = kit.total(kit.valid(labels), everyone), 0
    scale = dist.get_world_size(everyone) if c.averaged else 1
    parts = list(zip(tokens.chunk(c.microbatches), labels.chunk(c.microbatches)))
    for i, (t, y) in enumerate(parts):
        with last(i == len(parts) - 1):
            loss = kit.loss_of(model(t), y, "sum") / count
            (loss * scale).backward()
            share += loss.detach()
    return share


def bring_together(c, parameters, group):
    (kit.mean_grads if c.averaged else kit.sum_grads)(parameters, group)


def with_groups(c, ref):
    """tp, sp, cp, ulysses, ep: beside data parallelism, by hand."""
    mesh = kit.mesh_of(dp=c.dp, **{c.mode: c.n})
    dp, group = mesh.get_group("dp"), mesh.get_group(c.mode)
    attention = {"tp": lambda: kit.TpAttention(group), "cp": lambda: kit.ContextAttention(group), "ulysses": lambda: Ulysses(group)}.get(c.mode)
    mlp = {"tp": lambda: kit.TpMlp(group), "sp": lambda: kit.TpMlp(group, sequence=True), "ep": lambda: kit.EpMoe(group)}.get(c.mode)
    model = net(c, *((kit.SequenceNet, mlp, None, group) if c.mode == "sp" else (kit.Net, mlp, attention if c.attention else None)))
    shards = {"tp": kit.TP_SHARDS, "sp": kit.TP_SHARDS, "ep": kit.EP_SHARDS}.get(c.mode, {})
    kit.load(model, ref.weights, group, shards)
    own, same = kit.sharded(model, shards), kit.replicated(model, shards)
    split = c.mode in ("cp", "ulysses")
    everyone = None if split or c.mode == "ep" else dp
    tokens, labels = kit.cp_shares(ref.batch, dp, group) if split else kit.rows_of(ref.batch, everyone)

    def backward():
        share = accumulate(c, model, tokens, labels, everyone)
        if c.mode == "sp":
            kit.sum_grads([p for p in same if p is not model.head.weight or c.tied], group)
        bring_together(c, same, everyone)
        bring_together(c, own, dp)
        for p in own if c.mode == "ep" and c.averaged else ():
            p.grad /= c.n
        return kit.total(share, everyone)

    clip = (lambda ps: kit.clip_sharded(ps, own, group)) if own else kit.clip
    return kit.training(model, backward, optimizer_of(c, model.parameters()), clip if c.clip else None)


def with_wrapper(c, ref):
    """ddp, fsdp1, fsdp2, and gradients in one flat buffer."""
    mesh = kit.mesh_of(dp=c.dp)
    model = kit.load(net(c), ref.weights)
    call, last, clip = model, lambda yes: nullcontext(), kit.clip
    if c.mode == "ddp":
        call = DistributedDataParallel(model, gradient_as_bucket_view=c.recompute)
        last = lambda yes: nullcontext() if yes else call.no_sync()  # noqa: E731
    elif c.mode == "fsdp1":
        call = model = FullyShardedDataParallel(model, sharding_strategy=ShardingStrategy.NO_SHARD if c.tied else ShardingStrategy.FULL_SHARD,
                                                use_orig_params=True)
        clip = lambda ps: model.clip_grad_norm_(kit.MAX_NORM)  # noqa: E731
    elif c.mode == "fsdp2":
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        clip = lambda ps: nn.utils.clip_grad_norm_(ps, kit.MAX_NORM).full_tensor()  # noqa: E731
    tokens, labels = kit.rows_of(ref.batch, None)
    parameters = list(model.parameters())

    def backward():
        if c.mode == "buffers":
            flat, at = torch.zeros(sum(p.numel() for p in parameters)), 0
            for p in parameters:
                p.grad = flat[at:at + p.numel()].view_as(p)
                at += p.numel()
        share = accumulate(c, call, tokens, labels, None, last)
        if c.mode == "buffers":
            dist.all_reduce(flat, op=dist.ReduceOp.AVG if c.averaged else dist.ReduceOp.SUM)
        return kit.total(share)

    return kit.training(model, backward, optimizer_of(c, model.parameters()), clip if c.clip else None)


def with_stages(c, ref):
    """pp, by torch's schedules."""
    pp = kit.mesh_of(pp=c.n).get_group("pp")
    model = net(c)
    model.load_state_dict(ref.weights)
    stage = kit.Stage(pp.rank(), pp.size(), c.layers)
    stage.layers = nn.ModuleDict({k: model.layers[int(k)] for k in stage.layers})
    if stage.first:
        stage.embed = model.embed
    if stage.last:
        stage.norm, stage.head = model.norm, model.head
    count = kit.valid(ref.batch["labels"])
    schedule = (Schedule1F1B if c.averaged else ScheduleGPipe)(PipelineStage(stage, pp.rank(), pp.size(), torch.device("cpu")), c.microbatches,
                                                            lambda logits, y: kit.loss_of(logits, y, "sum") / count, scale_grads=False)

    def backward():
        losses = []
        schedule.step(*((ref.batch["tokens"],) if stage.first else ()),
                      **({"target": ref.batch["labels"], "losses": losses} if stage.last else {}))
        return {"loss": sum(losses)} if stage.last else {}

    clip = (lambda ps: kit.clip_stage(ps, ps, pp)) if c.clip else None
    return kit.training(stage, backward, optimizer_of(c, stage.parameters()), clip)


def program(seed):
    c = choose(seed)
    build = with_stages if c.mode == "pp" else with_groups if c.mode in DEGREES else with_wrapper
    return reference_of(c), lambda ref: build(c, ref), c.ranks, str(c)
