"""Every rank rotates its block of the sequence as if it were the first.

Mirrors https://github.com/deepspeedai/Megatron-DeepSpeed/pull/392: RoPE ignored the offset of the sequence-parallel rank.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ring_attention
from ring_attention import RANKS, reference

EXPECT = {"verdict": "REFUTED", "file": "models/llama.py",
          "line": "return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)",
          "also": [("wrong/rope_offset.py", "return torch.arange(length)")]}


def block_positions(length):
    return torch.arange(length)


def parallel(ref):
    return ring_attention.parallel(ref, block_positions=block_positions)
