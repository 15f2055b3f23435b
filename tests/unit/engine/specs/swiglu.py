"""A model with a fused custom op, explained in OPS; `how` says in which way."""
import torch
import torch.nn.functional as F

import trainverify as tv

RANKS = 2


@torch.library.custom_op("tvtest::fused_swiglu", mutates_args=())
def fused_swiglu(gate: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * torch.sigmoid(gate) * gate * up


@torch.library.custom_op("tvtest::fused_swiglu_backward", mutates_args=())
def fused_swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.sigmoid(gate)
    return scale * grad * up * s * (1 + gate * (1 - s)), scale * grad * gate * s


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.scale = inputs[2]


fused_swiglu.register_autograd(lambda ctx, grad: (*fused_swiglu_backward(grad, *ctx.saved_tensors, ctx.scale), None), setup_context=_setup)


def plain(gate, up, scale):
    """scale * silu(gate) * up"""
    return F.silu(gate) * up * scale


def plain_backward(grad, gate, up, scale):
    leaves = gate.detach(), up.detach()
    s = leaves[0].sigmoid()
    return (grad * leaves[1] * scale) * (s + leaves[0] * s * (1 - s)), F.silu(leaves[0]) * grad * scale


OPS = [tv.op("tvtest::fused_swiglu", meaning=plain), tv.op("tvtest::fused_swiglu_backward", meaning=plain_backward)]


class Mlp(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.gate, self.up, self.down = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 3)
        self.f = f

    def forward(self, x):
        return self.down(self.f(self.gate(x), self.up(x), 0.5))


def training(f, weights=None, batch=None):
    model = Mlp(f)
    if weights:
        model.load_state_dict(weights)
    x = torch.randn(5, 4) if batch is None else batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return tv.Training(model, step, batch=x)


def reference():
    torch.manual_seed(0)
    return training(plain)


def parallel(ref, swapped: bool = False):
    return training((lambda g, u, s: fused_swiglu(u, g, s)) if swapped else fused_swiglu, ref.weights, ref.batch)
