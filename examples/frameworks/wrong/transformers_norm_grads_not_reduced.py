"""transformers' tensor parallelism whose norms of queries and keys keep the gradients of one rank's heads: their all-reduce is dropped."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce

import transformers_qwen3
from common.planted import edited
from transformers_qwen3 import reference

RANKS = 2


def parallel(ref):
    ReplicatedWithGradAllReduce.install_forward = edited(
        ReplicatedWithGradAllReduce.install_forward, "dist.all_reduce(param.grad, group=mesh.get_group())", "pass")
    return transformers_qwen3.parallel(ref)
