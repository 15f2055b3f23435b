"""megatron-core's column-parallel linear layer whose input gradient stays this tensor-parallel rank's share: its all-reduce is dropped."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.tensor_parallel import ColumnParallelLinear

import megatron_gpt
from common.planted import edited
from megatron_gpt import reference

RANKS = 2


def parallel(ref):
    ColumnParallelLinear.forward = edited(
        ColumnParallelLinear.forward, "allreduce_dgrad = False if self.explicit_expert_comm else self.allreduce_dgrad", "allreduce_dgrad = False")
    return megatron_gpt.parallel(ref, tp=2)
