"""Programs without any optimizer: what is compared is what they report, and what becomes of the parameters."""
import torch
import torch.distributed as dist
from smallgpt import load, loss_of, share
from smallgpt import reference as trained

import trainverify as tv

RANKS = 2


def reference():
    made = trained()
    model, batch = made.model, made.batch

    def step():
        model.zero_grad()
        loss = loss_of(model(batch["tokens"]), batch["labels"], reduction="sum")
        loss.backward()
        return {"loss": loss, **{f"norm of {name}": p.grad.norm() for name, p in model.named_parameters()}}

    return tv.Training(model, step, batch=batch)


def norms(ref, wrong):
    model, data = load(ref), share(ref.batch, dist.get_world_size(), dist.get_rank())

    def step():
        model.zero_grad()
        loss = loss_of(model(data["tokens"]), data["labels"], reduction="mean" if wrong else "sum")
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return {"loss": tv.local(loss, reduce="sum"), **{f"norm of {name}": p.grad.norm() for name, p in model.named_parameters()}}

    return tv.Training(model, step)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
