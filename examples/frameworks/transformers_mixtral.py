"""Mixtral under the tensor and expert parallelism of transformers (`DistributedConfig`), loaded from the reference's checkpoint.

Every rank reads the whole batch. Matrices are sharded as the model's own plan says, norms and routers stay plain tensors; with
ep=2 each rank holds half of the experts, and tokens travel by all-to-all.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from transformers import DistributedConfig, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_tp import training  # noqa: E402
from models.llama import IGNORE, random_batch  # noqa: E402

RANKS = 2
CASES = [{"ep": 1}, {"ep": 2}]
SIZES = dict(vocab_size=20, hidden_size=20, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
             max_position_embeddings=16, use_cache=False)
CONFIG = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)


def batch_of(vocab):
    """The model shifts the labels itself."""
    batch = random_batch(rows=5, length=7, vocab=vocab)
    return {"tokens": batch["tokens"], "labels": batch["tokens"].where(batch["labels"] != IGNORE, IGNORE)}


def clip_over_meshes(parameters, max_norm):
    """`clip_grad_norm_` for gradients of several meshes and of none: a norm for each, then one of all."""
    parts = {}
    for p in parameters:
        parts.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    norms = [get_total_norm([p.grad for p in part]) for part in parts.values()]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    for part in parts.values():
        clip_grads_with_norm_(part, max_norm, total)
    return total


def reference():
    torch.manual_seed(0)
    return training(MixtralForCausalLM(CONFIG), batch_of(CONFIG.vocab_size), clip_grad_norm_)


def parallel(ref, ep=1):
    dist.init_process_group("nccl")
    layout = DistributedConfig(tp_size=dist.get_world_size(), ep_size=ep, ep_implementation="all_to_all")
    model = MixtralForCausalLM.from_pretrained(ref.checkpoint(), distributed_config=layout)
    model.train()
    return training(model, ref.batch, clip_over_meshes)
