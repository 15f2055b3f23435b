"""The gradients of the norm weights are not summed over the sequence-parallel ranks.

Mirrors https://github.com/NVIDIA/Megatron-LM/issues/1446: the final norm was not marked as sequence parallel.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_style_tp
from megatron_style_tp import RANKS, ParallelLlama, reference

EXPECT = {"verdict": "REFUTED", "file": "megatron_style_tp.py",
          "line": "return torch.stack([p.grad.pow(2).sum() for p in parameters]).sum()",
          "also": [("megatron_style_tp.py", "p.grad.mul_(coefficient)"), ("megatron_style_tp.py", "optimizer.step()")]}


class Wrong(ParallelLlama):
    def sync_norm_grads(self):
        pass


def parallel(ref):
    return megatron_style_tp.parallel(ref, Wrong)
