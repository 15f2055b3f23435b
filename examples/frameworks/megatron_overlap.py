"""megatron-core's communication behind computation: overlap_grad_reduce (buckets of gradients, while the backward runs) and overlap_param_gather.

Parameters that are gathered while the next forward runs are stale until then; after the last step they are gathered as before a checkpoint is written.
"""
from common.mcore import Layout, checkpoint, training

CASES = [{"dp": 2}, {"dp": 2, "distributed_optimizer": True}]


def RANKS(dp=2, **other):
    return dp


def reference():
    return training()


def parallel(ref, dp=2, **layout):
    return training(Layout(overlap=True, **layout), load=checkpoint(ref.checkpoint()), data=ref.batch)
