"""The gradients of the norm weights are summed over the ranks a second time.

Mirrors https://github.com/hpcaitech/ColossalAI/issues/247: a gradient that is already reduced is reduced again.
"""
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_style_tp
from megatron_style_tp import RANKS, ParallelLlama, reference

EXPECT = {"verdict": "REFUTED", "file": "wrong/norm_grads_reduced_twice.py", "line": "dist.all_reduce(p.grad)"}


class Wrong(ParallelLlama):
    def sync_norm_grads(self):
        super().sync_norm_grads()
        for p in self.norm_weights():
            dist.all_reduce(p.grad)


def parallel(ref):
    return megatron_style_tp.parallel(ref, Wrong)
