"""The ring turns the other way, while the masks still assume that blocks come from the previous rank.

Mirrors https://github.com/NVIDIA/Megatron-LM/issues/1464: a wrong chunk in the backward of ring attention.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ring_attention
from ring_attention import RANKS, reference

EXPECT = {"verdict": "REFUTED", "file": "ring_attention.py",
          "line": "scores = q @ k.mT * q.shape[-1] ** -0.5",
          "also": [("ring_attention.py", "largest = scores.amax(-1, keepdim=True)"),
                   ("ring_attention.py", "new_top = torch.maximum(top, largest)"),
                   ("ring_attention.py", "shrink, weights = (top - new_top).exp(), (scores - new_top).exp()"),
                   ("ring_attention.py", "out = out * shrink + weights @ kv[1]"),
                   ("ring_attention.py", "out = out / total"),
                   ("wrong/ring_direction.py", "works = dist.batch_isend_irecv(sends_and_receives)"),
                   ("wrong/ring_direction.py", "work.wait()")]}


def rotate(block):
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(block)
    sends_and_receives = [dist.P2POp(dist.isend, block, (rank - 1) % world),
                          dist.P2POp(dist.irecv, received, (rank + 1) % world)]
    works = dist.batch_isend_irecv(sends_and_receives)
    for work in works:
        work.wait()
    return received


def parallel(ref):
    return ring_attention.parallel(ref, rotate=rotate)
