"""DeepSpeed issues 5618 and 6545 (pull request 6546): ZeRO reduces the gradient of each expert to the rank that owns its optimizer state, and
divides by the number of the experts' replicas in place of the number of data-parallel ranks."""
import torch.distributed as dist
from kit import EP_SHARDS, EpMoe, Moe, Net, adamw, load, loss_of, make_batch, mean_grads, mesh_of, replicated, rows_of, sharded, single, total, valid

import trainverify as tv

RANKS = 6
BUG = {"id": "B6", "link": "https://github.com/deepspeedai/DeepSpeed/issues/6545", "diagnosis": "multiple",
       "line": "p.grad /= divisor", "also": ["dist.reduce(p.grad, owner", "optimizer.step()"]}


def reference():
    return single(lambda: Net(mlp=Moe), batch=make_batch(12, 10), clip=None)


def parallel(ref, fixed=False):
    mesh = mesh_of(edp=2, ep=3)
    edp, ep = mesh.get_group("edp"), mesh.get_group("ep")
    model = load(Net(mlp=lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    tokens, labels = rows_of(ref.batch, None)
    experts, dense = sharded(model, EP_SHARDS), replicated(model, EP_SHARDS)
    owned = [p for i, p in enumerate(experts) if i % edp.size() == edp.rank()]
    optimizer = adamw([*dense, *owned])

    def reduce_to_owners(divisor):
        for i, p in enumerate(experts):
            owner = dist.get_global_rank(edp, i % edp.size())
            p.grad /= divisor
            dist.reduce(p.grad, owner, group=edp)

    def step():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * mesh.size()).backward()
        mean_grads(dense, None)
        reduce_to_owners(mesh.size() if fixed else edp.size())
        optimizer.step()
        model.zero_grad()
        for i, p in enumerate(experts):
            dist.broadcast(p.detach(), dist.get_global_rank(edp, i % edp.size()), group=edp)
        return {"loss": total(loss)}

    return tv.Training(model, step)
