"""PyTorch issue 160285 (torchtitan): experts are sharded by FSDP over the ranks that hold replicas of them, which averages their gradients over
these ranks only. The tokens of all expert-parallel ranks are in each gradient, so that one division by their number is missing."""
import torch.distributed as dist
from kit import EP_SHARDS, MAX_NORM, EpMoe, Moe, Net, adamw, load, loss_of, make_batch, mesh_of, replicated, rows_of, sharded, single, total, training, valid
from torch import nn
from torch.distributed.fsdp import fully_shard

RANKS = 6
BUG = {"id": "B9", "link": "https://github.com/pytorch/pytorch/issues/160285", "diagnosis": "multiple",
       "line": "squares = [nn.utils.get_total_norm(", "also": ["(loss * mesh.size()).backward()", "y = super().run(x"]}


def reference():
    return single(lambda: Net(mlp=Moe), batch=make_batch(12, 10))


def parallel(ref, fixed=False):
    mesh = mesh_of(edp=2, ep=3)
    ep = mesh.get_group("ep")
    model = load(Net(mlp=lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    fully_shard(model.layers[0].mlp, mesh=mesh["edp"], ignored_params={model.layers[0].mlp.router.weight})
    if fixed:
        model.layers[0].mlp.set_gradient_divide_factor(mesh.size())
    dense = replicated(model, EP_SHARDS)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * mesh.size()).backward()
        for p in dense:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        return total(loss)

    def clip(parameters):
        experts = sharded(model, EP_SHARDS)
        squares = [nn.utils.get_total_norm([p.grad.to_local() for p in experts]) ** 2, nn.utils.get_total_norm([p.grad for p in dense]) ** 2]
        norm = (total(squares[0]) + squares[1]).sqrt()
        for p in parameters:
            p.grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        return norm

    return training(model, backward, adamw(model.parameters(), fused=False), clip=clip)
