"""DeepSpeed's ZeRO-2 whose gradients are clipped by the norm of each rank's own partition: the all-reduce of squares is dropped."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed_zero
from common.planted import edited
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed_zero import reference

RANKS = 2


def parallel(ref):
    DeepSpeedZeroOptimizer.get_grad_norm_direct = edited(
        DeepSpeedZeroOptimizer.get_grad_norm_direct, "dist.all_reduce(total_norm, op=dist.ReduceOp.SUM, group=self.dp_process_group)", "pass")
    return deepspeed_zero.parallel(ref, stage=2)
