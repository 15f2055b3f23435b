"""torchtitan's DeepSeek-V3 671B at its true sizes: its own model, expert parallel over 8 ranks, which share the rest of the weights by FSDP2 (fsdp) or by
torchtitan's plan of tensor parallelism (tp).

    trainverify verify examples/frameworks/torchtitan_deepseek_v3_671b.py                                                    # small sizes, all values
    trainverify verify examples/frameworks/torchtitan_deepseek_v3_671b.py --full-size --case size=671b,layers=61,dense=3,how=tp     # true sizes, no memory

Latent attention, routing, dispatch, grouped products and loss are torchtitan's; attention is plain causal. Tokens go to experts in turn, as torchtitan's
own option for balanced routing has it: which experts the scores would choose is no part of what is verified.
"""
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss  # noqa: E402
from torchtitan.config import ParallelismConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.utils import set_spmd_backend  # noqa: E402
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import TokenChoiceTopKRouter  # noqa: E402
from torchtitan.models.deepseek_v3 import _EMBEDDING_INIT, _NORM_INIT, _build_dsv3_layers, _output_linear_init  # noqa: E402
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model  # noqa: E402
from torchtitan.models.deepseek_v3.mtp import apply_fsdp_to_mtp_decoder  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402, F401  (the configuration imports it: once here, and not in each rank)

import trainverify as tv  # noqa: E402
from models.llama import random_batch  # noqa: E402

class BalancedRouter(TokenChoiceTopKRouter):
    """torchtitan's own balanced routing of all tokens, also where they are sharded."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        pass

    first = 0                                 # which of all tokens this rank's first one is, where it has its own

    def _debug_force_load_balance_routing(self, scores):
        shape = (*scores.shape[:-1], self.top_k)
        experts = torch.arange(scores.shape[0] * scores.shape[1] * self.top_k).reshape(shape)
        if isinstance(scores, DTensor):       # the shape is that of all tokens
            experts = distribute_tensor(experts % self.num_experts, scores.device_mesh, scores.placements, src_data_rank=None)
        else:
            experts = (experts + self.first * self.top_k) % self.num_experts
        return experts, scores.gather(-1, experts)


RANKS = 8
SIZES = {"small": dict(dim=48, n_heads=8, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, dense_hidden_dim=40,
                       moe_hidden_dim=16, num_experts=16, router_top_k=2),
         "671b": dict(dim=7168, n_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, dense_hidden_dim=18432,
                      moe_hidden_dim=2048, num_experts=256, router_top_k=8)}
LENGTHS = {"small": 8, "671b": 4104}           # not 4096: each rank's tokens then go to the same experts, by the same slots
VOCAB = {"small": 48, "671b": 129_280}


def config(size, layers, dense, dims):
    """torchtitan's configuration of DeepSeek-V3 at these sizes, with `dense` layers that have no experts."""
    sizes, vocab, length = SIZES[size], VOCAB[size], LENGTHS[size]
    dim = sizes["dim"]
    rope = ComplexRoPE.Config(dim=sizes["qk_rope_head_dim"], max_seq_len=length, theta=10000.0, scaling="yarn", rope_factor=40.0, beta_fast=32.0, beta_slow=1.0,
                              original_seq_len=length)
    model = DeepSeekV3Model.Config(
        dim=dim, vocab_size=vocab, norm=RMSNorm.Config(normalized_shape=dim, param_init=_NORM_INIT),
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim, param_init=_EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=_output_linear_init(dim)),
        layers=_build_dsv3_layers(
            **sizes, n_layers=layers, n_dense_layers=dense, mscale=1.0, num_shared_experts=1, router_score_func="sigmoid", router_num_expert_groups=8,
            router_num_limited_groups=4, router_route_scale=2.5, router_route_norm=True, attn_backend="varlen", moe_comm_backend="standard",
            non_blocking_capacity_factor=None, rope=rope))
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        if layer.moe is not None:
            layer.moe.router = BalancedRouter.Config(**{**{f.name: getattr(layer.moe.router, f.name) for f in fields(layer.moe.router)},
                                                        "_debug_force_load_balance": True})
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", tensor_parallel_degree=dims.tp, expert_parallel_degree=dims.ep,
                                    data_parallel_shard_degree=dims.dp_shard)
    model.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    return model


def build(size, layers, dense, how):
    set_spmd_backend("partial_dtensor")
    ranks = RANKS if how else 1
    dims = ParallelDims(dp_replicate=1, dp_shard=ranks if how == "fsdp" else 1, cp=1, tp=ranks if how == "tp" else 1, pp=1, ep=ranks, world_size=ranks,
                        spmd_backend="partial_dtensor")
    with torch.device("meta"):
        model = config(size, layers, dense, dims).build()
    if how:
        dims.build_mesh()
        model.parallelize(dims)
    if how == "fsdp":
        apply_fsdp_to_mtp_decoder(model, dims.get_mesh("fsdp"), param_dtype=torch.float32, reduce_dtype=torch.float32, pp_enabled=False, ep_degree=ranks,
                                  edp_mesh=dims.get_optional_mesh("efsdp"))
        for router in (m for m in model.modules() if isinstance(m, BalancedRouter)):
            router.first = torch.distributed.get_rank() * LENGTHS[size]
    model.to_empty(device="cuda")
    with torch.no_grad():
        model.init_states(buffer_device=None)
    return model


def training(model, batch, rows, shared=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False)
    tokens, labels = batch["tokens"][rows], batch["labels"][rows]
    valid = (batch["labels"] != IGNORE_INDEX).sum()

    def step():
        loss = cross_entropy_loss(model(tokens), labels) / valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if shared:                            # each rank has the loss of its rows
            loss = loss.detach()
            torch.distributed.all_reduce(loss)
        return {"loss": loss}

    return model, step


def reference(size="small", layers=2, dense=1, how="fsdp"):
    torch.manual_seed(0)
    batch = random_batch(rows=RANKS if how == "fsdp" else 1, length=LENGTHS[size], vocab=VOCAB[size])
    return tv.Training(*training(build(size, layers, dense, ""), batch, slice(None)), batch=batch)


def parallel(ref, size="small", layers=2, dense=1, how="fsdp"):
    model = build(size, layers, dense, how)
    with torch.no_grad():
        for name, mine in (*model.named_parameters(), *model.named_buffers()):
            if name not in ref.weights:       # tables that every rank computes
                continue
            whole = ref.weights[name]
            if isinstance(mine, DTensor):
                mine.to_local().copy_(distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None).to_local())
            else:
                mine.copy_(whole)
    rank = torch.distributed.get_rank()
    return tv.Training(*(training(model, ref.batch, slice(rank, rank + 1), True) if how == "fsdp" else training(model, ref.batch, slice(None))))
