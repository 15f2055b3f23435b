"""Qwen3 under the tensor parallelism of transformers: norms of queries and keys see one rank's heads, and their gradients are summed."""
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from transformers import DistributedConfig, Qwen3Config, Qwen3ForCausalLM

from transformers_mixtral import SIZES, batch_of, clip_over_meshes, training

RANKS = 2
CONFIG = Qwen3Config(**SIZES)


def reference():
    torch.manual_seed(0)
    return training(Qwen3ForCausalLM(CONFIG), batch_of(CONFIG.vocab_size), clip_grad_norm_)


def parallel(ref):
    dist.init_process_group("nccl")
    model = Qwen3ForCausalLM.from_pretrained(ref.checkpoint(), distributed_config=DistributedConfig(tp_plan="auto"))
    model.train()
    return training(model, ref.batch, clip_over_meshes)
