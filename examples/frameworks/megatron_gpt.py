"""megatron-core's GPTModel (GQA, RMSNorm, SwiGLU, RoPE) with its own DDP, schedules, finalize_model_grads and optimizer, against itself at world size 1."""
from common.mcore import Layout, checkpoint, training

CASES = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"pp": 2},
    {"dp": 2, "distributed_optimizer": True},
    {"tp": 2, "pp": 2},
]


def RANKS(tp=1, pp=1, dp=1, **other):
    return tp * pp * dp


def reference():
    return training()


def parallel(ref, dp=1, **layout):
    return training(Layout(**layout), load=checkpoint(ref.checkpoint()), data=ref.batch)
