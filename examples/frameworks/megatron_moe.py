"""megatron-core's mixture of experts: top-2 routing with an auxiliary loss, tokens sent to their experts by the all-to-all dispatcher."""
from common.mcore import Layout, checkpoint, training

MOE = dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=12, moe_token_dispatcher_type="alltoall",
           moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1)
# `norm if norm else 0.0`: either way the number that is added is the norm. World size 1 has one optimizer, and nothing to add.
ACCEPT = ["megatron/core/optimizer/optimizer.py:1284"]
CASES = [
    {"dp": 2, "ep": 2},
    {"dp": 2, "tp": 2, "sp": True, "ep": 2, "distributed_optimizer": True},
    {"dp": 2, "pp": 2, "ep": 2},
    {"tp": 2, "sp": True, "pp": 2, "ep": 2, "etp": 1, "distributed_optimizer": True},
]


def RANKS(dp=1, tp=1, pp=1, **other):
    return dp * tp * pp


def reference():
    return training(**MOE)


def parallel(ref, dp=1, **layout):
    return training(Layout(**layout), load=checkpoint(ref.checkpoint()), data=ref.batch, **MOE)
