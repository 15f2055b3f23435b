"""torch's data parallelism: DDP, FSDP1, FSDP2 and ZeroRedundancyOptimizer, with accumulation, mixed precision and both kinds of activation checkpoints.

Ranks count different numbers of tokens, every token weighs the same, and gradients are clipped.
"""
from common import programs

programs.use()

import data_parallel  # noqa: E402
import sharding  # noqa: E402
from smallgpt import reference  # noqa: E402, F401

HOW = {
    "bucket_view": data_parallel, "checkpointed": data_parallel, "checkpointed_reentrant": data_parallel, "zero": data_parallel,
    "fsdp1_original": data_parallel, "fsdp1_flat": data_parallel, "fsdp1_accumulate": sharding, "fsdp1_mixed": sharding,
    "fsdp2_keep": data_parallel, "fsdp2_mixed": data_parallel, "fsdp2_accumulate": data_parallel, "hsdp": data_parallel,
}
CASES = [{"how": how} for how in HOW]
RANKS = data_parallel.RANKS


def parallel(ref, how):
    return HOW[how].parallel(ref, how)
