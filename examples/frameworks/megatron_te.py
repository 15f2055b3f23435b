"""megatron-core's TransformerEngine layers (norms fused into linear layers, ring attention under context parallelism), by the stand-in for that package."""
import transformer_engine  # noqa: F401  (Megatron goes without where it is missing)

from common.mcore import Layout, checkpoint, training

CASES = [{"tp": 2, "sp": True}, {"cp": 2}, {"cp": 3, "distributed_optimizer": True}, {"tp": 2, "sp": True, "cp": 2}]
SETTINGS = dict(engine=True, length=12, calculate_per_token_loss=True)


def RANKS(tp=1, cp=1, **other):
    return tp * cp


def reference():
    return training(**SETTINGS)


def parallel(ref, **layout):
    return training(Layout(**layout), load=checkpoint(ref.checkpoint()), data=ref.batch, **SETTINGS)
