"""The two halves of the fused gate and up weight are swapped.

Mirrors https://github.com/ml-explore/mlx-lm/pull/767: silu was applied to the other of the two.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_style_tp
from megatron_style_tp import RANKS, ParallelLlama, reference, shard

EXPECT = {"verdict": "REFUTED", "file": "megatron_style_tp.py",
          "line": "return x + ReduceScatter.apply(F.linear(F.silu(gate) * up, self.down))",
          "also": [("wrong/gate_up_swapped.py", "return torch.cat((shard(up), shard(gate)))")]}


class Wrong(ParallelLlama):
    def fuse_gate_up(self, gate, up):
        return torch.cat((shard(up), shard(gate)))


def parallel(ref):
    return megatron_style_tp.parallel(ref, Wrong)
