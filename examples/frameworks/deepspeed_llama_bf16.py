"""DeepSpeed as it is used most: a Hugging Face Llama in bfloat16 under ZeRO, with a master copy in float32; the reference is float32 throughout."""
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

import deepspeed_zero as zero
from deepspeed_zero import RANKS, groups  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

import trainverify as tv
from models.llama import IGNORE, random_batch, token_loss

CASES = [{"stage": 2}]
CONFIG = LlamaConfig(vocab_size=16, hidden_size=12, intermediate_size=10, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
                     max_position_embeddings=16, use_cache=False)


def reference():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    batch = random_batch(rows=12, length=5, vocab=CONFIG.vocab_size)

    def step():
        loss = token_loss(model(input_ids=batch["tokens"]).logits, batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), zero.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


def parallel(ref, stage):
    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(ref.weights)
    settings = {**zero.settings(stage), "bf16": {"enabled": True}}
    engine, *_ = zero.deepspeed.initialize(model=model, model_parameters=groups(model), config=settings, dist_init_required=False)
    tokens, labels = (ref.batch[k].chunk(world)[rank] for k in ("tokens", "labels"))
    parts = list(zip(tokens.chunk(zero.MICROBATCHES), labels.chunk(zero.MICROBATCHES)))

    def step():
        total_tokens = sum((labels != IGNORE).sum() for _, labels in parts)
        dist.all_reduce(total_tokens)
        loss = 0.0
        for tokens, labels in parts:
            part = token_loss(engine(input_ids=tokens).logits.float(), labels, reduction="sum") / total_tokens
            engine.backward(part * world * zero.MICROBATCHES)
            engine.step()
            loss = loss + part.detach()
        return {"loss": tv.local(loss, reduce="sum"), "grad_norm": engine.get_global_grad_norm()}

    return tv.Training(engine.module, step)
