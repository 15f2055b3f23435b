"""miles_diffusion PR 35: the gradient norm of FSDP2 parameters is a DTensor that is reduced only when it is used: its local value
covers this rank's shards. Clipping uses the whole, but the logged number was taken from the local value."""
from kit import MAX_NORM, Net, load, loss_of, mesh_of, rows_of, single, total, training, valid
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

RANKS = 3
BUG = {"id": "D20", "link": "https://github.com/radixark/miles_diffusion/pull/35", "diagnosis": "partial sum",
       "line": "grad_norm = norm.to_local()", "also": ["local = get_total_norm("]}
reference = single


def clip(parameters, mesh, fixed):
    local = get_total_norm([p.grad.to_local() for p in parameters])
    norm = DTensor.from_local(local, mesh, [_NormPartial(2)])
    clip_grads_with_norm_(parameters, MAX_NORM, norm)
    if fixed:
        grad_norm = norm.full_tensor()
    else:
        grad_norm = norm.to_local()
    return grad_norm.item()


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3)
    model = load(Net(), ref.weights)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * RANKS).backward()
        return total(loss)

    return training(model, backward, clip=lambda ps: clip(ps, mesh, fixed))
