"""VeOmni issue 184: with hybrid sharding (FSDP inside a group, replicas across groups) the squares of the local gradient norms were
summed over both axes of the mesh. Every replica has all shards: the norm is too large by the square root of the replicas."""
import torch
import torch.distributed as dist
from kit import MAX_NORM, Net, load, loss_of, make_batch, mesh_of, rows_of, single, total, training, valid
from torch.distributed.fsdp import fully_shard

RANKS = 6
BUG = {"id": "D7", "link": "https://github.com/ByteDance-Seed/VeOmni/issues/184", "diagnosis": "additive term",
       "line": "dist.all_reduce(square, group=group)", "also": ["norm = square.sqrt()"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


def local_shards(parameters):
    return [p.grad.to_local() for p in parameters]


def clip_grad_norm(parameters, groups):
    square = torch.stack([g.square().sum() for g in local_shards(parameters)]).sum()
    for group in groups:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    torch._foreach_mul_(local_shards(parameters), (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel(ref, fixed=False):
    mesh = mesh_of(replicate=3, shard=2)
    model = load(Net(), ref.weights)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    tokens, labels = rows_of(ref.batch, None)
    groups = [mesh.get_group("shard")]
    if not fixed:
        groups.append(mesh.get_group("replicate"))

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * RANKS).backward()
        return total(loss)

    return training(model, backward, clip=lambda ps: clip_grad_norm(ps, groups))
