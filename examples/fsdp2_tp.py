"""FSDP2 x tensor parallelism on a 3 x 2 mesh, with sequence parallelism and a vocabulary-parallel loss.

`parallelize_module` shards every weight over tp, then `fully_shard` shards it again over dp. The dp ranks hold
different numbers of tokens: the loss is normalised by the count over all of them.
"""
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel,
                                               loss_parallel, parallelize_module)
from torch.nn.utils import clip_grad_norm_

import trainverify as tv
from models.llama import IGNORE, Config, Llama, random_batch, token_loss

DP, TP = 3, 2
RANKS = DP * TP
CONFIG = Config()
MAX_NORM = 0.5

MODEL_PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
}
LAYER_PLAN = {
    "attention_norm": SequenceParallel(),
    "attention": PrepareModuleInput(input_layouts=(Shard(1), None, None),
                                    desired_input_layouts=(Replicate(), None, None)),
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(),
    "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    "mlp_norm": SequenceParallel(),
    "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "mlp.gate": ColwiseParallel(),
    "mlp.up": ColwiseParallel(),
    "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
}


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = random_batch(rows=6, length=8, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


def count_tokens(labels, mesh):
    """The tokens that count in the batches of all dp ranks."""
    tokens = (labels != IGNORE).sum()
    dist.all_reduce(tokens, group=mesh.get_group("dp"))
    return tokens


def parallel(ref, count_tokens=count_tokens):
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    model = Llama(CONFIG)
    model.load_state_dict(ref.weights)
    parallelize_module(model, mesh["tp"], MODEL_PLAN)
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], LAYER_PLAN)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens, labels = (ref.batch[k].chunk(DP)[mesh.get_local_rank("dp")] for k in ("tokens", "labels"))

    def step():
        total_tokens = count_tokens(labels, mesh)
        with loss_parallel():
            loss_sum = token_loss(model(tokens), labels, reduction="sum")
            # FSDP averages the gradients over dp, so each rank's share counts DP times.
            (loss_sum / total_tokens * DP).backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_sum.detach().full_tensor() / total_tokens
        dist.all_reduce(loss, group=mesh.get_group("dp"))
        return {"loss": loss, "grad_norm": norm.full_tensor()}

    return tv.Training(model, step)
