"""megatron-core with calculate_per_token_loss: gradients are divided by the tokens of all microbatches and ranks, once, in finalize_model_grads."""
from common.mcore import Layout, checkpoint, training

CASES = [{"dp": 2}, {"dp": 2, "distributed_optimizer": True}, {"tp": 2, "sp": True}]


def RANKS(dp=1, tp=1, **other):
    return dp * tp


def reference():
    return training(calculate_per_token_loss=True)


def parallel(ref, dp=1, **layout):
    return training(Layout(**layout), load=checkpoint(ref.checkpoint()), data=ref.batch, calculate_per_token_loss=True)
