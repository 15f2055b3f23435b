"""Ways by which a program takes over the reference's weights, batch and optimizer state."""
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import trainverify as tv

RANKS = 2


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def training(model, optimizer, **more):
    x = torch.ones(3, 4)

    def step():
        model(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return tv.Training(model, step, **more)


def reference():
    """A reference that has trained before: its optimizer has state."""
    model, optimizer = build()
    first = training(model, optimizer)
    first.step()

    def save(folder):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/state.pt")
        np.savez(f"{folder}/state.npz", **{k: v.detach().numpy() for k, v in model.state_dict().items()})
        dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/dcp")
    return tv.Training(model, first.step, save=save)


def whole(ref):
    model, optimizer = build()
    loaded = torch.load(f"{ref.checkpoint()}/state.pt", weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return training(model, optimizer)


def mmap(ref):
    model, optimizer = build()
    model.load_state_dict(torch.load(f"{ref.checkpoint()}/state.pt", mmap=True, weights_only=True)["model"], assign=True)
    return training(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def numpy(ref):
    model, optimizer = build()
    loaded = np.load(f"{ref.checkpoint()}/state.npz")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(loaded[name]))
    return training(model, optimizer)


def sliced(ref):
    """Tensor parallel: each rank builds its own half from slices."""
    n, r = dist.get_world_size(), dist.get_rank()
    w = ref.weights
    model = nn.Sequential(nn.Linear(4, 6 // n), nn.Linear(6 // n, 2, bias=False))
    model.load_state_dict({"0.weight": w["0.weight"].chunk(n)[r], "0.bias": w["0.bias"].chunk(n)[r], "1.weight": w["1.weight"].chunk(n, 1)[r]})
    x = torch.ones(3, 4)
    return tv.Training(model, lambda: model(x).sum().backward())


def distributed_checkpoint(ref):
    model, optimizer = build()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{ref.checkpoint()}/dcp")
    model.load_state_dict(state["model"])
    return training(model, optimizer)


def half(ref):
    model, optimizer = build()
    model.load_state_dict(ref.weights)
    model.to(torch.bfloat16)
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    return tv.Training(model, lambda: model(x).sum().backward())


def parallel(ref, how):
    return globals()[how](ref)
