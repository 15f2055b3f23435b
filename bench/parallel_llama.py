"""A deep, thin Llama at DP2 x TP2 (with sequence parallelism) x PP2, two microbatches: what depth costs. LAYERS is read from the environment."""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import trainverify as tv  # noqa: E402
from fsdp2_tp import LAYER_PLAN  # noqa: E402
from models.llama import IGNORE, Config, Llama, random_batch, rope_table, token_loss  # noqa: E402

DP, PP, TP = 2, 2, 2
RANKS = DP * PP * TP
MICROBATCHES = 2
LAYERS = int(os.environ.get("LAYERS", "32"))
CONFIG = Config(vocab=24, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=24, layers=LAYERS)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def reference():
    torch.manual_seed(0)
    model, batch = Llama(CONFIG), random_batch(rows=DP * MICROBATCHES, length=8, vocab=CONFIG.vocab)
    optimizer = optimizer_of(model)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    return tv.Training(model, step, batch=batch)


class Stage(nn.Module):
    """Half of the layers, with the embedding before or the head after them."""

    def __init__(self, model, stage):
        super().__init__()
        half = LAYERS // PP
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in range(stage * half, (stage + 1) * half)})
        self.embed = model.embed if stage == 0 else None
        self.norm, self.head = (model.norm, model.head) if stage == PP - 1 else (None, None)

    def forward(self, x):
        length = x.shape[1] if self.embed is not None else x.shape[1] * TP
        cos, sin = rope_table(torch.arange(length), CONFIG.head_dim)
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        return x if self.head is None else self.head(self.norm(x))


def parallelized(stage, mesh):
    plan = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}
    parallelize_module(stage, mesh, {name: style for name, style in plan.items() if getattr(stage, name) is not None})
    for layer in stage.layers.values():
        parallelize_module(layer, mesh, LAYER_PLAN)
    return stage


def parallel(ref):
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cpu", (DP, PP, TP), mesh_dim_names=("dp", "pp", "tp"))
    dp, pp = mesh.get_local_rank("dp"), mesh.get_local_rank("pp")
    model = Llama(CONFIG)
    model.load_state_dict(ref.weights)
    stage = parallelized(Stage(model, pp), mesh["tp"])
    optimizer = optimizer_of(stage)
    tokens, labels = (ref.batch[k].chunk(DP)[dp] for k in ("tokens", "labels"))
    total_tokens = (ref.batch["labels"] != IGNORE).sum()

    def microbatch_loss(logits, target):
        return token_loss(logits, target, reduction="sum") / total_tokens

    pipeline = Schedule1F1B(PipelineStage(stage, pp, PP, torch.device("cpu"), group=mesh.get_group("pp")), MICROBATCHES, microbatch_loss, scale_grads=False)

    def step():
        losses = []
        pipeline.step(tokens) if pp == 0 else pipeline.step(target=labels, losses=losses)
        for p in stage.parameters():
            p.grad = p.grad.redistribute(placements=p.placements)
            dist.all_reduce(p.grad.to_local(), group=mesh.get_group("dp"))
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": tv.local(torch.stack(losses).sum(), reduce="sum", group=mesh.get_group("dp"))} if losses else None

    return tv.Training(stage, step)
