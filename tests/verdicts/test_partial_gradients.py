"""The gradient of a DTensor parameter may be a sum over ranks that nobody has taken yet: it means the sum, and its reader takes it."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import trainverify as tv
from judge import assert_equal

WIDTH, LENGTH = 5, 6


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x)


def training(model, x, partial, batch=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        loss = F.gelu(model(x)).square().sum() / LENGTH
        loss.backward()
        partial(model)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return tv.Training(model, step, batch=batch)


def reference():
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, WIDTH)
    return training(Normed(), x, lambda model: None, {"x": x})


def parallel(ref):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = Normed()
    model.load_state_dict(ref.weights)
    parallelize_module(model, mesh, {"norm": SequenceParallel()})

    def expect_partial(model):
        assert all(p.grad.placements[0].is_partial() for p in model.parameters())

    plain = training(model, ref.batch["x"].chunk(2, 1)[mesh.get_local_rank()], expect_partial)

    def step():
        return {"loss": plain.step()["loss"].full_tensor()}
    return tv.Training(model, step)


def test_shares_are_summed_before_they_are_compared():
    assert_equal(tv.verify(reference, parallel, ranks=2))
