"""Pipeline schedules of torch.distributed.pipelining: one, or two stages on each of 2 ranks."""
import torch
import torch.distributed as dist
from smallgpt import IGNORE, Gpt, adamw, load, loss_of
from smallgpt import reference as two_layers
from torch import nn
from torch.distributed import pipelining

import trainverify as tv

RANKS = 2
LAYERS = 4


def reference():
    return two_layers(layers=LAYERS)


class Stage(nn.Module):
    """Some layers, after the embedding if they are the first, before the head if they are the last."""

    def __init__(self, model, layers):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.embed, self.positions = (model.embed, model.positions) if 0 in layers else (None, None)
        self.norm, self.head = (model.norm, model.head) if LAYERS - 1 in layers else (None, None)

    def forward(self, x):
        if self.embed is not None:
            x = self.embed(x) + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x))


def pipeline(ref, wrong, schedule, numbers, parts=3):
    """numbers: the stages of this rank; the first rank has the first stage."""
    model, rank = load(ref, layers=LAYERS), dist.get_rank()
    stages, size = len(numbers) * RANKS, LAYERS // (len(numbers) * RANKS)
    own = [pipelining.PipelineStage(Stage(model, range(i * size, (i + 1) * size)), i, stages, torch.device("cpu")) for i in numbers]
    total = (ref.batch["labels"] != IGNORE).sum()

    def loss_fn(logits, labels):
        return loss_of(logits, labels, reduction="sum") / total

    run = schedule(own if len(own) > 1 else own[0], parts, loss_fn=loss_fn, scale_grads=wrong)
    chunks = nn.ModuleList(s.submod for s in own)
    optimizer = adamw(chunks.parameters())
    first, last = 0 in numbers, stages - 1 in numbers

    def step():
        losses = []
        run.step(*((ref.batch["tokens"],) if first else ()), **({"target": ref.batch["labels"], "losses": losses} if last else {}))
        square = nn.utils.get_total_norm([p.grad for p in chunks.parameters()]) ** 2
        dist.all_reduce(square)
        nn.utils.clip_grads_with_norm_(chunks.parameters(), 0.1, square.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return {"norm": square.sqrt(), **({"loss": torch.stack(losses).sum()} if losses else {})}

    return tv.Training(list(chunks), step)


def gpipe(ref, wrong):
    return pipeline(ref, wrong, pipelining.ScheduleGPipe, [dist.get_rank()])


def looped_bfs(ref, wrong):
    return pipeline(ref, wrong, pipelining.ScheduleLoopedBFS, [dist.get_rank(), dist.get_rank() + 2])


def zero_bubble(ref, wrong):
    return pipeline(ref, wrong, pipelining.ScheduleInterleavedZeroBubble, [dist.get_rank(), dist.get_rank() + 2])


def zbv(ref, wrong):
    return pipeline(ref, wrong, pipelining.ScheduleZBVZeroBubble, [dist.get_rank(), 3 - dist.get_rank()])


def dual_pipe_v(ref, wrong):
    return pipeline(ref, wrong, pipelining.schedules.ScheduleDualPipeV, [dist.get_rank(), 3 - dist.get_rank()], parts=6)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
