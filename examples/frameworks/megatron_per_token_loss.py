"""megatron-core with calculate_per_token_loss: gradients are divided by the tokens of all microbatches and ranks, once, in finalize_model_grads."""
from common.mcore import Layout, checkpoint, training

CASES = [{"dp": 2, "tp": 1}, {"dp": 1, "tp": 2}, {"dp": 2, "tp": 1, "distributed_optimizer": True}]


def RANKS(dp=2, tp=1, distributed_optimizer=False):
    return dp * tp


def reference():
    return training(calculate_per_token_loss=True)


def parallel(ref, dp=2, tp=1, distributed_optimizer=False):
    layout = Layout(tp, sp=tp > 1, distributed_optimizer=distributed_optimizer)
    return training(layout, load=checkpoint(ref.checkpoint()), data=ref.batch, calculate_per_token_loss=True)
