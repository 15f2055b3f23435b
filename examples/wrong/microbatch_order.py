"""Every microbatch is trained on the labels of the one before."""
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ddp_accumulation
from ddp_accumulation import MICROBATCHES, RANKS, reference

EXPECT = {"verdict": "REFUTED", "file": "models/llama.py",
          "line": "return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, "
                  "reduction=reduction)",
          "also": [("wrong/microbatch_order.py", "late = labels.roll(labels.shape[0] // MICROBATCHES, dims=0)")]}


def microbatches(batch):
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, labels = (batch[k].chunk(world)[rank] for k in ("tokens", "labels"))
    late = labels.roll(labels.shape[0] // MICROBATCHES, dims=0)
    return list(zip(tokens.chunk(MICROBATCHES), late.chunk(MICROBATCHES)))


def parallel(ref):
    return ddp_accumulation.parallel(ref, microbatches=microbatches)
