"""PyTorch issue 172932: a DTensor whose value is partial goes through to_local() and from_local(), which looks like doing nothing. The gradient
that comes back is whole on every rank and is taken for a share of it, so that it is summed once more."""
import torch.nn.functional as F
from kit import MAX_NORM, Mlp, Net, adamw, load, loss_of, mesh_of, single, training
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

RANKS = 3
BUG = {"id": "E6", "link": "https://github.com/pytorch/pytorch/issues/172932", "diagnosis": "multiple",
       "line": "y = DTensor.from_local(y.to_local(",
       "also": ["y = F.linear(F.gelu(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)", "p.grad.full_tensor() if isinstance"]}
PLACES = {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1), "down.bias": Replicate()}
reference = single


class DtensorMlp(Mlp):
    fixed = False

    def forward(self, x):
        mesh = self.up.weight.device_mesh
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        y = F.linear(F.gelu(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)
        grads = Replicate() if self.fixed else Partial()
        y = DTensor.from_local(y.to_local(grad_placements=[grads]), mesh, [Partial()], run_check=False)
        return (y.redistribute(placements=[Replicate()]) + self.down.bias).to_local(grad_placements=[Replicate()])


def clip(parameters):
    whole = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in parameters]
    norm = nn.utils.get_total_norm(whole)
    for p in parameters:
        p.grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel(ref, fixed=False):
    mesh = mesh_of(tp=3)
    DtensorMlp.fixed = fixed
    model = load(Net(mlp=DtensorMlp), ref.weights)
    for name, place in PLACES.items():
        module, kind = name.split(".")
        owner = getattr(model.layers[0].mlp, module)
        owner.register_parameter(kind, nn.Parameter(distribute_tensor(getattr(owner, kind).detach(), mesh, [place])))

    def backward():
        loss = loss_of(model(ref.batch["tokens"]), ref.batch["labels"])
        loss.backward()
        return loss

    return training(model, backward, adamw(model.parameters(), fused=False), clip=clip)
