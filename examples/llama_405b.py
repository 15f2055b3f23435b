"""Llama 3.1 405B at its true sizes: tensor parallel 8 with sequence parallel, forward, backward and one update, on 8 ranks.

    trainverify verify examples/llama_405b.py                                           # small sizes, all values
    trainverify verify examples/llama_405b.py --full-size --case size=405b,layers=126   # true sizes, no memory

The parallel model is examples/megatron_style_tp.py's. Nothing in it knows which of the two runs it is in.
"""
import torch
import torch.distributed as dist

import trainverify as tv
from megatron_style_tp import ParallelLlama
from models.llama import IGNORE, Config, Llama, random_batch, token_loss

RANKS = 8
SIZES = {"small": Config(vocab=48, hidden=20, heads=16, kv_heads=8, head_dim=6, ffn=56),
         "405b": Config(vocab=128_256, hidden=16_384, heads=128, kv_heads=8, head_dim=128, ffn=53_248)}
LENGTHS = {"small": 24, "405b": 8192}


def config(size, layers):
    return Config(**{**vars(SIZES[size]), "layers": layers})


def reference(size="small", layers=2):
    torch.manual_seed(0)
    model = Llama(config(size, layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=True)
    batch = random_batch(rows=2, length=LENGTHS[size], vocab=SIZES[size].vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    return tv.Training(model, step, batch=batch)


def parallel(ref, size="small", layers=2, model_class=ParallelLlama):
    dist.init_process_group("nccl")
    model = model_class(config(size, layers))
    model.load(ref.weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=True)
    tokens, labels = (ref.batch[k].T.contiguous() for k in ("tokens", "labels"))

    def step():
        loss = model(tokens, labels) / (labels != IGNORE).sum()
        loss.backward()
        model.sync_norm_grads()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    return tv.Training(model, step)
