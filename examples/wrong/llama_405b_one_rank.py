"""One rank of eight takes the gate for the values and the values for the gate, in one layer: true sizes hide it among 126 layers.

At full size: --full-size --case size=405b,layers=126,layer=77,rank=5
"""
import sys
from pathlib import Path

import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llama_405b
from llama_405b import RANKS, reference
from megatron_style_tp import ColumnLinear, ParallelBlock, ParallelLlama, ReduceScatter

EXPECT = {"verdict": "REFUTED", "file": "wrong/llama_405b_one_rank.py",
          "line": "return x + ReduceScatter.apply(F.linear(F.silu(up) * gate, self.down))"}


class Swapped(ParallelBlock):
    def forward(self, x, cos, sin):
        x = x + ReduceScatter.apply(F.linear(self.attend(self.attention_norm(x), cos, sin), self.wo))
        gate, up = self.column_linear.apply(self.mlp_norm(x), self.gate_up).chunk(2, dim=-1)
        return x + ReduceScatter.apply(F.linear(F.silu(up) * gate, self.down))


def parallel(ref, size="small", layers=2, layer=1, rank=5):
    def model(config):
        made = ParallelLlama(config)
        if dist.get_rank() == rank:
            made.layers[layer] = Swapped(config, ColumnLinear)
        return made
    return llama_405b.parallel(ref, size, layers, model)
