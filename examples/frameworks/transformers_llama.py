"""Llama under the tensor parallelism of transformers, with one matrix for embedding and head; queries of three heads share a key."""
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from transformers import DistributedConfig, LlamaConfig, LlamaForCausalLM

from transformers_mixtral import SIZES, batch_of, clip_over_meshes, training

RANKS = 2
CASES = [{"tied": False}, {"tied": True}]


def config(tied):
    return LlamaConfig(**(SIZES | {"hidden_size": 24}), tie_word_embeddings=tied)


def reference(tied=False):
    torch.manual_seed(0)
    return training(LlamaForCausalLM(config(tied)), batch_of(SIZES["vocab_size"]), clip_grad_norm_)


def parallel(ref, tied=False):
    dist.init_process_group("nccl")
    model = LlamaForCausalLM.from_pretrained(ref.checkpoint(), distributed_config=DistributedConfig(tp_plan="auto"))
    model.train()
    return training(model, ref.batch, clip_over_meshes)
