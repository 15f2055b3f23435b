"""Accelerate issue 2665: the optimizer was built before FSDP replaced the parameters. It holds the old tensors, which get no
gradient any more: the step does nothing, without an error."""
from kit import Net, adamw, load, loss_of, mesh_of, rows_of, single, total, training, valid
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

RANKS = 3
BUG = {"id": "D16", "link": "https://github.com/huggingface/accelerate/issues/2665", "diagnosis": "never updated",
       "line": "optimizer = adamw(model.parameters())", "also": ["fully_shard(model, mesh=mesh)"]}
reference = single


def prepare(model, mesh, fixed):
    optimizer = adamw(model.parameters())
    fully_shard(model, mesh=mesh)
    if fixed:
        optimizer = adamw(model.parameters())
    return model, optimizer


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3)
    model, optimizer = prepare(load(Net(), ref.weights), mesh, fixed)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * RANKS).backward()
        return total(loss)

    return training(model, backward, optimizer, lambda ps: clip_grad_norm_(ps, 0.1).full_tensor())
