"""Pipeline parallelism with torch.distributed.pipelining on 3 ranks: 1F1B, and interleaved 1F1B as a second case.

Each microbatch adds the sum of its losses divided by the tokens of the whole batch, so the schedule must not scale
the gradients once more. The gradient norm is taken over all stages.
"""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import trainverify as tv
from models.llama import IGNORE, Config, Llama, random_batch, rope_table, token_loss

RANKS = 3
CASES = [dict(schedule="1F1B", stages_per_rank=1), dict(schedule="Interleaved1F1B", stages_per_rank=2)]
MICROBATCHES = 4
CONFIG = Config(layers=6)
MAX_NORM = 0.5


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = random_batch(rows=8, length=5, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


class Stage(nn.Module):
    """Some layers of the model, with the embedding before the first and the head after the last."""

    def __init__(self, model, layers):
        super().__init__()
        self.config = model.config
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.embed = model.embed if 0 in layers else None
        last = CONFIG.layers - 1 in layers
        self.norm, self.head = (model.norm, model.head) if last else (None, None)

    def forward(self, x):
        cos, sin = rope_table(torch.arange(x.shape[1]), self.config.head_dim)
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        return x if self.head is None else self.head(self.norm(x))


def stage_layers(stage, stages):
    """The layers that a stage runs."""
    size = CONFIG.layers // stages
    return range(stage * size, (stage + 1) * size)


def parallel(ref, schedule, stages_per_rank, stage_layers=stage_layers):
    dist.init_process_group("nccl")
    rank, stages = dist.get_rank(), stages_per_rank * RANKS
    model = Llama(CONFIG)
    model.load_state_dict(ref.weights)
    own = [PipelineStage(Stage(model, stage_layers(i, stages)), i, stages, torch.device("cpu"))
           for i in range(rank, stages, RANKS)]
    tokens, labels = ref.batch["tokens"], ref.batch["labels"]
    total_tokens = (labels != IGNORE).sum()

    def microbatch_loss(logits, target):
        return token_loss(logits, target, reduction="sum") / total_tokens

    schedule_class = get_schedule_class(schedule)
    single = issubclass(schedule_class, PipelineScheduleSingle)
    pipeline = schedule_class(own[0] if single else own, MICROBATCHES, microbatch_loss, scale_grads=False)
    chunks = nn.ModuleList(stage.submod for stage in own)
    optimizer = torch.optim.AdamW(chunks.parameters(), lr=1e-2, weight_decay=0.1)

    def step():
        losses = []
        if rank == 0:
            pipeline.step(tokens)
        elif rank == RANKS - 1:
            pipeline.step(target=labels, losses=losses)
        else:
            pipeline.step()
        square = get_total_norm([p.grad for p in chunks.parameters()]) ** 2
        dist.all_reduce(square)
        norm = square.sqrt()
        clip_grads_with_norm_(chunks.parameters(), MAX_NORM, norm)
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            return {"loss": torch.stack(losses).sum(), "grad_norm": norm}
        return {"grad_norm": norm}

    return tv.Training(list(chunks), step)
