"""megatron-core's TEGroupedMLP: the experts of a rank in one grouped product, top-2 routing, all-to-all dispatcher; by the stand-in for TransformerEngine."""
import transformer_engine  # noqa: F401  (Megatron goes without where it is missing)

from common.mcore import Layout, checkpoint, training

MOE = dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=12, moe_token_dispatcher_type="alltoall", moe_grouped_gemm=True,
           engine=True, calculate_per_token_loss=True)
# `norm if norm else 0.0`: either way the number that is added is the norm. World size 1 has one optimizer, and nothing to add.
ACCEPT = ["megatron/core/optimizer/optimizer.py:1284"]
CASES = [{"dp": 2, "ep": 2}]


def RANKS(dp=2, ep=2):
    return dp


def reference():
    return training(**MOE)


def parallel(ref, dp=2, ep=2):
    return training(Layout(ep=ep), load=checkpoint(ref.checkpoint()), data=ref.batch, **MOE)
