"""The tokens that count are counted over the tensor-parallel ranks instead of the data-parallel ones.

Mirrors https://github.com/verl-project/verl/issues/5983: the token count was reduced over the wrong group.
"""
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fsdp2_tp
from fsdp2_tp import RANKS, reference
from models.llama import IGNORE

EXPECT = {"verdict": "REFUTED", "file": "fsdp2_tp.py", "line": "(loss_sum / total_tokens * DP).backward()",
          "also": [("wrong/wrong_group.py", "dist.all_reduce(tokens, group=mesh.get_group(\"tp\"))")]}


def count_tokens(labels, mesh):
    tokens = (labels != IGNORE).sum()
    dist.all_reduce(tokens, group=mesh.get_group("tp"))
    return tokens


def parallel(ref):
    return fsdp2_tp.parallel(ref, count_tokens=count_tokens)
