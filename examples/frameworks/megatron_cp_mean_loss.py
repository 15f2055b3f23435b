"""megatron-core's context parallelism without calculate_per_token_loss: a finding.

Each rank divides its loss by the tokens that count in its own part of the sequence, and the parts are averaged. Where the
parts do not count equally many tokens (padding, masked prompts), that is not the mean over the microbatch's tokens.
Upstream: https://github.com/NVIDIA/Megatron-LM/pull/7513
"""
import transformer_engine  # noqa: F401  (Megatron goes without where it is missing)

from common.mcore import Layout, checkpoint, training

RANKS = 2


def reference():
    return training(engine=True, length=12)


def parallel(ref):
    return training(Layout(cp=2), load=checkpoint(ref.checkpoint()), data=ref.batch, engine=True, length=12)
