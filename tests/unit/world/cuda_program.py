"""A training script as people write them for torchrun on GPUs: everything is hard-coded for CUDA. Run by test_shim.py."""
import os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.full((), 2.0, device="cuda")

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.full((), 2.0, device="cuda")


def set_up():
    assert torch.cuda.is_available() and torch.cuda.device_count() >= 1
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    dist.init_process_group("nccl", device_id=device)
    assert dist.get_backend() == "nccl" and torch.cuda.current_device() == local_rank
    torch.manual_seed(0)
    torch.cuda.manual_seed_all(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    assert torch.cuda.get_device_capability() >= (8, 0) and torch.cuda.is_bf16_supported()
    assert torch.cuda.get_device_properties(device).total_memory > 0
    return device


def streams(x):
    side, done = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
        y.record_stream(side)
        done.record()
    torch.cuda.current_stream().wait_event(done)
    torch.cuda.synchronize()
    with torch.cuda.device(x.device), torch.cuda.nvtx.range("step"):
        torch.cuda.nvtx.range_push("inner")
        torch.cuda.nvtx.range_pop()
    return y


def placement(device):
    x = torch.randn(2, 4).pin_memory().cuda(non_blocking=True)
    x = x.to(device, non_blocking=True).to("cuda:0").to(device.index).to(device="cuda", dtype=torch.float32)
    generator = torch.Generator(device="cuda")
    assert isinstance(generator, torch.Generator) and isinstance(torch.default_generator, torch.Generator)
    torch.randn(2, device=device, generator=generator.manual_seed(1))
    torch.zeros(2, device=0)
    torch.cuda.FloatTensor([1.0]).type(torch.cuda.HalfTensor)
    with torch.device("cuda"):
        torch.ones(2)
    torch.set_default_device("cuda")
    torch.ones(2)
    torch.set_default_device(None)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(state)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 0
    return x


def train_ddp(device, x, y, folder):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).to(device).cuda()
    model = torch.compile(model, mode="max-autotune")
    assert model._orig_mod is not None and not any("_orig_mod" in name for name in model.state_dict())
    model = DistributedDataParallel(model, device_ids=[device.index], output_device=device.index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda") == torch.bfloat16
        loss = F.cross_entropy(model(x).float(), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0
    path = os.path.join(folder, f"model{dist.get_rank()}.pt")
    torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, map_location=f"cuda:{device.index}"))
    return loss


def attention_and_recompute(x):
    leaf = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
    checkpoint(lambda v: torch.zeros(2, 4, device="cuda") + Scale.apply(v), leaf, use_reentrant=False).sum().backward()
    assert leaf.grad.eq(2).all()


def shard(x):
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("dp",))
    layer = nn.Linear(4, 4, device="cuda")
    fully_shard(layer, mesh=mesh)
    layer(x).sum().backward()
    wrapped = FullyShardedDataParallel(nn.Linear(4, 4).cuda(), device_id=torch.cuda.current_device(), use_orig_params=True)
    wrapped(x).sum().backward()


def main(folder):
    device = set_up()
    x = placement(device)
    streams(x)
    y = torch.randint(0, 4, (2,), device=f"cuda:{device.index}")
    loss = train_ddp(device, x, y, folder)
    attention_and_recompute(x)
    shard(x)
    total = torch.zeros(1, device="cuda")
    total += loss.detach()
    dist.barrier(device_ids=[device.index])
    assert dist.get_backend(dist.new_group(backend="gloo")) == "gloo"
    dist.destroy_process_group()
    return total.item()
