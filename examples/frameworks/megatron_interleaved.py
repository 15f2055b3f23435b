"""megatron-core's interleaved pipeline: two chunks of layers on each rank, also with reductions that overlap the backward and gathers that overlap the forward."""
from common.mcore import Layout, checkpoint, training

CASES = [{"pp": 2, "vpp": 2}, {"pp": 2, "vpp": 2, "dp": 2, "distributed_optimizer": True, "overlap": True}]
LAYERS = 4                                     # one for each chunk


def RANKS(pp=1, dp=1, **other):
    return pp * dp


def reference():
    return training(layers=LAYERS)


def parallel(ref, dp=1, **layout):
    return training(Layout(**layout), load=checkpoint(ref.checkpoint()), data=ref.batch, layers=LAYERS)
