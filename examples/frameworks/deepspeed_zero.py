"""DeepSpeed's engine: ZeRO stage 1, 2 or 3, three microbatches per step, gradients clipped; the reference is plain PyTorch.

DeepSpeed averages gradients over ranks and microbatches, so that each microbatch's loss counts its share of all tokens
times the number of shares.
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed  # noqa: E402

import trainverify as tv  # noqa: E402
from models.llama import IGNORE, Config, Llama, random_batch, token_loss  # noqa: E402

RANKS = 2
CASES = [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 2, "defaults": True}, {"stage": 3, "defaults": True}]
CONFIG = Config(vocab=20, hidden=12, heads=6, kv_heads=2, head_dim=4, ffn=10, layers=2)
MICROBATCHES = 3
MAX_NORM = 0.1
BUCKETS = {"reduce_bucket_size": 2_000, "allgather_bucket_size": 2_000}      # elements; half a billion by default: all gradients in one bucket
SHARDS = {"stage3_param_persistence_threshold": 50, "stage3_prefetch_bucket_size": 500}      # elements; only norms stay whole


def groups(model):
    """Weight decay for matrices only."""
    return [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    batch = random_batch(rows=12, length=7, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


def settings(stage, defaults=False):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROBATCHES,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage, **({} if defaults else BUCKETS | (SHARDS if stage == 3 else {}))},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def parallel(ref, stage, defaults=False):
    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Llama(CONFIG)
    model.load_state_dict(ref.weights)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups(model), config=settings(stage, defaults), dist_init_required=False)
    tokens, labels = (ref.batch[k].chunk(world)[rank] for k in ("tokens", "labels"))
    parts = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def step():
        total_tokens = sum((labels != IGNORE).sum() for _, labels in parts)
        dist.all_reduce(total_tokens)
        loss = 0.0
        for tokens, labels in parts:
            part = token_loss(engine(tokens), labels, reduction="sum") / total_tokens
            engine.backward(part * world * MICROBATCHES)
            engine.step()
            loss = loss + part.detach()
        return {"loss": tv.local(loss, reduce="sum"), "grad_norm": engine.get_global_grad_norm()}

    return tv.Training(engine.module, step)
