"""The fused query, key and value weight is cut as if all queries came first, then all keys, then all values.

Mirrors https://github.com/vllm-project/vllm/pull/36242: an interleaved grouped-query weight was split in the middle.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_style_tp
from megatron_style_tp import RANKS, ParallelLlama, reference, shard

EXPECT = {"verdict": "REFUTED", "file": "wrong/qkv_slice.py", "line": "return shard(torch.cat((q, k, v)))",
          "also": [("models/llama.py", "return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)"),
                   ("megatron_style_tp.py", "out = F.scaled_dot_product_attention(q, k, v, is_causal=True)")]}


class Wrong(ParallelLlama):
    def fuse_qkv(self, q, k, v):
        return shard(torch.cat((q, k, v)))


def parallel(ref):
    return megatron_style_tp.parallel(ref, Wrong)
