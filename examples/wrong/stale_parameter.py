"""One rank never writes the last parameter back after the others have updated it.

Mirrors https://github.com/deepspeedai/DeepSpeed/pull/2058: a rank copied the wrong partition of the updated parameters.
"""
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ring_attention
from ring_attention import RANKS, reference

EXPECT = {"verdict": "REFUTED", "file": "wrong/stale_parameter.py", "line": "p.detach().copy_(updated)",
          "also": [("ring_attention.py", "optimizer.step()"), ("models/llama.py", "return self.head(self.norm(x))")]}


def share_updates(parameters):
    last_rank = dist.get_rank() == RANKS - 1
    for i, p in enumerate(parameters):
        updated = p.detach().clone()
        dist.broadcast(updated, src=i % RANKS)
        if not last_rank or i + 1 < len(parameters):
            p.detach().copy_(updated)


def parallel(ref):
    return ring_attention.parallel(ref, share_updates=share_updates)
