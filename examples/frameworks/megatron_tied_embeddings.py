"""megatron-core's pipeline whose first and last stage hold the same embedding: its gradient is the sum of both stages'."""
from common.mcore import Layout, checkpoint, training

CASES = [{"pp": 2}, {"pp": 2, "tp": 2}]


def RANKS(pp=1, tp=1):
    return pp * tp


def reference():
    return training(tied=True)


def parallel(ref, **layout):
    return training(Layout(**layout), load=checkpoint(ref.checkpoint()), data=ref.batch, tied=True)
