"""Hugging Face Llama under the tensor parallelism of transformers, loaded from the reference's checkpoint.

`DistributedConfig(tp_plan="auto")` shards the matrices as the model's own plan says and leaves the norm weights plain
tensors, so the gradients are clipped as `transformers.Trainer` does it: DTensors and plain ones apart.
"""
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from transformers import DistributedConfig, LlamaConfig, LlamaForCausalLM

import trainverify as tv
from models.llama import IGNORE, random_batch

RANKS = 2
CONFIG = LlamaConfig(vocab_size=36, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=4, max_position_embeddings=16, use_cache=False)
MAX_NORM = 0.5


def training(model, batch, clip):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def step():
        loss = model(input_ids=batch["tokens"], labels=batch["labels"]).loss
        loss.backward()
        norm = clip(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch, save=model.save_pretrained)


def clip_sharded_and_replicated(parameters, max_norm):
    """`clip_grad_norm_` for gradients of which some are DTensors: one norm for each kind, then both together."""
    parameters = list(parameters)
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    norms = [get_total_norm([p.grad for p in sharded]).full_tensor(), get_total_norm([p.grad for p in replicated])]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for part in (sharded, replicated):
        clip_grads_with_norm_(part, max_norm, total)
    return total


def reference():
    torch.manual_seed(0)
    batch = random_batch(rows=5, length=8, vocab=CONFIG.vocab_size)
    batch["labels"] = batch["tokens"].where(batch["labels"] != IGNORE, IGNORE)       # the model shifts them itself
    return training(LlamaForCausalLM(CONFIG), batch, clip_grad_norm_)


def parallel(ref):
    dist.init_process_group("nccl")
    model = LlamaForCausalLM.from_pretrained(ref.checkpoint(), distributed_config=DistributedConfig(tp_plan="auto"))
    model.train()
    return training(model, ref.batch, clip_sharded_and_replicated)
