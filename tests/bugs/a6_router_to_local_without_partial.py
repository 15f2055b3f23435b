"""torchtitan pull request 2388: every tensor-parallel rank routes its own part of the tokens with the router's weight, a replicated DTensor. Its
to_local() promises the gradient to be replicated, where it is this rank's share (Partial)."""
import torch.nn.functional as F
from kit import MAX_NORM, Gather, Moe, Net, Scatter, adamw, load, loss_of, mesh_of, single, training
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

RANKS = 3
BUG = {"id": "A6", "link": "https://github.com/pytorch/torchtitan/pull/2388", "diagnosis": "partial sum",
       "line": "scores = F.linear(mine, weight)", "also": ["weight = self.router.weight.to_local(", "plain = ["]}


def reference():
    return single(lambda: Net(mlp=Moe))


class TokenParallelMoe(Moe):
    fixed = False

    def forward(self, x):
        mine = Scatter.apply(x, None, 1)
        weight = self.router.weight.to_local(grad_placements=[Partial()] if self.fixed else None)
        scores = F.linear(mine, weight).softmax(-1)
        chosen = scores.topk(2).indices
        weights = scores * scores.new_zeros(scores.shape).scatter(-1, chosen, 1.0)
        return self.run(x, Gather.apply(weights, None, 1, False))


def clip(parameters):
    plain = [(p.grad.full_tensor() if isinstance(p, DTensor) else p.grad) for p in parameters]
    norm = nn.utils.get_total_norm(plain)
    for p in parameters:
        p.grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel(ref, fixed=False):
    mesh = mesh_of(tp=RANKS)
    TokenParallelMoe.fixed = fixed
    model = load(Net(mlp=TokenParallelMoe), ref.weights)
    router = model.layers[0].mlp.router
    router.weight = nn.Parameter(distribute_tensor(router.weight.detach(), mesh, [Replicate()]))

    def backward():
        loss = loss_of(model(ref.batch["tokens"]), ref.batch["labels"])
        loss.backward()
        return loss

    return training(model, backward, adamw(model.parameters(), fused=False), clip=clip)
