"""NeMo-RL PR 3788: the gradient norm of a DTensor model was the square root of a sum over the tensor-parallel ranks of all local
gradients, whatever their placement: those of replicated parameters count once per rank. The fix sums only the sharded ones."""
import torch
import torch.distributed as dist
from kit import MAX_NORM, Mlp, Net, loss_of, mesh_of, rows_of, single, total, training, valid
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

RANKS = 6
BUG = {"id": "D5", "link": "https://github.com/NVIDIA-NeMo/RL/pull/3788", "diagnosis": "additive term",
       "line": "dist.all_reduce(over_tp, group=tp)",
       "also": ["over_tp = torch.stack([square(g) for g in grads])", "norm = over_tp.sqrt()"]}


def reference():
    return single(lambda: Net(Mlp))


def square(grad):
    return (grad.to_local() if isinstance(grad, DTensor) else grad).square().sum()


def get_grad_norm(parameters, tp, fixed):
    grads = [p.grad for p in parameters]
    if fixed:
        over_tp = total(torch.stack([square(g) for g in grads if isinstance(g, DTensor) and g.placements[0].is_shard()]).sum(), tp)
        once = [square(g) for g in grads if not (isinstance(g, DTensor) and g.placements[0].is_shard())]
        norm = (over_tp + torch.stack(once).sum()).sqrt()
    else:
        over_tp = torch.stack([square(g) for g in grads]).sum()
        dist.all_reduce(over_tp, group=tp)
        norm = over_tp.sqrt()
    return norm


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = Net(Mlp)
    model.load_state_dict(ref.weights)
    for layer in model.layers:
        parallelize_module(layer.mlp, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    tokens, labels = rows_of(ref.batch, dp)

    def local_grads(parameters):
        return [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        for grad in local_grads(model.parameters()):
            dist.all_reduce(grad, group=dp)
        return total(loss, dp)

    def clip(parameters):
        norm = get_grad_norm(parameters, tp, fixed)
        torch._foreach_mul_(local_grads(parameters), (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        return norm

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    return training(model, backward, optimizer, clip)
