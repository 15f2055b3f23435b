"""The backward uses the gathered activations before the all-gather is known to have finished.

Mirrors https://github.com/NVIDIA/Megatron-LM/pull/3693: a missing wait in overlapped communication.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_style_tp
from megatron_style_tp import RANKS, ColumnLinear, ParallelLlama, all_gather, reduce_scatter, reference

EXPECT = {"verdict": ("REFUTED", "UNKNOWN"), "file": "wrong/read_before_wait.py",
          "line": "grad_weight = grad.flatten(0, 1).T @ gathered.flatten(0, 1)"}


class HastyColumnLinear(ColumnLinear):
    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        gathered, work = all_gather(x, async_op=True)
        grad_weight = grad.flatten(0, 1).T @ gathered.flatten(0, 1)
        grad_input = reduce_scatter(grad @ weight)
        work.wait()
        return grad_input, grad_weight


class Wrong(ParallelLlama):
    column_linear = HastyColumnLinear


def parallel(ref):
    return megatron_style_tp.parallel(ref, Wrong)
