"""The gradients of the experts, already sums over the tokens of all ranks, are not divided by the number of ranks.

Mirrors https://github.com/pytorch/pytorch/issues/160285: expert gradients were summed over the data-parallel ranks, not averaged.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moe_expert_parallel
from moe_expert_parallel import RANKS, reference

EXPECT = {"verdict": "REFUTED", "file": "moe_expert_parallel.py",
          "line": "square = get_total_norm([p.grad for p in experts]) ** 2",
          "also": [("moe_expert_parallel.py", "clip_grads_with_norm_(model.parameters(), MAX_NORM, norm)"),
                   ("moe_expert_parallel.py", "optimizer.step()")]}


def average_expert_grads(experts):
    pass


def parallel(ref):
    return moe_expert_parallel.parallel(ref, average_expert_grads=average_expert_grads)
