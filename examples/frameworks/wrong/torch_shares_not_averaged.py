"""torch's FSDP2 whose reduce-scatter sums the ranks' gradients where it should average them: the gradients are twice the reference's."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.fsdp._fully_shard import _fsdp_collectives

import torch_data_parallel
from common.planted import edited
from torch_data_parallel import reference

RANKS = 2


def parallel(ref):
    _fsdp_collectives._get_gradient_divide_factors = edited(
        _fsdp_collectives._get_gradient_divide_factors, "return None, None, ReduceOp.AVG, ReduceOp.AVG", "return None, None, ReduceOp.SUM, ReduceOp.SUM")
    return torch_data_parallel.parallel(ref, "fsdp2_keep")
