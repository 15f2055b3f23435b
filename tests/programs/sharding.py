"""Sharded training in its rarer forms: options of FSDP 1 and 2, and optimizer state sharded by hand over a flat buffer."""
from contextlib import nullcontext

import torch
import torch.distributed as dist
from data_parallel import full_norm, mine, run, sharded
from smallgpt import adamw, load
from smallgpt import reference  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, ShardingStrategy,
                                    fully_shard)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard

RANKS = lambda how, wrong=False: 4 if how == "fsdp1_hybrid" else 3 if how == "uneven" else 2  # noqa: E731


def fsdp1(ref, wrong, parts=1, before=None, **options):
    model = load(ref)
    blocks = ModuleWrapPolicy({type(model.layers[0])})
    model = FullyShardedDataParallel(model, auto_wrap_policy=blocks, device_id=torch.cuda.current_device(), **{"use_orig_params": True, **options})
    before = (lambda last: nullcontext() if last else model.no_sync()) if parts > 1 else lambda last: nullcontext()
    return run(model, mine(ref), wrong, parts=parts, before=before, clip=lambda parameters: model.clip_grad_norm_(0.1))


def fsdp1_grad_op(ref, wrong):
    return fsdp1(ref, wrong, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)


def fsdp1_no_shard(ref, wrong):
    return fsdp1(ref, wrong, sharding_strategy=ShardingStrategy.NO_SHARD)


def fsdp1_hybrid(ref, wrong):
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fsdp1(ref, wrong, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def fsdp1_mixed(ref, wrong):
    return fsdp1(ref, wrong, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16))


def fsdp1_accumulate(ref, wrong):
    return fsdp1(ref, wrong, parts=3)


def fsdp1_flat_accumulate(ref, wrong):
    return fsdp1(ref, wrong, parts=3, use_orig_params=False, forward_prefetch=True, limit_all_gathers=False)


def uneven(ref, wrong):
    """Three ranks: no size is a multiple of three."""
    return run(sharded(ref), mine(ref), wrong, clip=full_norm)


def other_dim(ref, wrong):
    """Matrices are sharded along their last dimension."""
    return run(sharded(ref, shard_placement_fn=lambda p: Shard(p.dim() - 1)), mine(ref), wrong, clip=full_norm)


def offload(ref, wrong):
    return run(sharded(ref, offload_policy=CPUOffloadPolicy()), mine(ref), wrong, clip=full_norm)


def prefetch(ref, wrong):
    """Sums instead of averages, prefetching by hand, reduction in bfloat16."""
    model = sharded(ref, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16))
    for module in (model, *model.layers):
        module.set_gradient_divide_factor(1.0)
    first, second = model.layers
    first.set_modules_to_forward_prefetch([second])
    second.set_modules_to_backward_prefetch([first])
    return run(model, mine(ref), not wrong, clip=full_norm)


def recompute(ref, wrong):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    model = load(ref)
    apply_activation_checkpointing(model, check_fn=lambda m: m in list(model.layers))
    for layer in model.layers:
        fully_shard(layer)
    return run(fully_shard(model), mine(ref), wrong, clip=full_norm)


class Flat:
    """ZeRO-1 by hand: bfloat16 parameters are views of a flat buffer, every rank updates its part of a float32 copy."""

    def __init__(self, model, wrong):
        self.parameters, world, rank = list(model.parameters()), dist.get_world_size(), dist.get_rank()
        sizes = [p.numel() for p in self.parameters]
        self.padded = -(-sum(sizes) // world) * world
        flat = torch.zeros(self.padded)
        torch.cat([p.detach().reshape(-1).float() for p in self.parameters], out=flat[: sum(sizes)])
        self.buffer, self.grads = flat.to(torch.bfloat16), torch.zeros(self.padded)
        for p, start in zip(self.parameters, torch.tensor([0, *sizes]).cumsum(0).tolist()):
            p.data = self.buffer[start:start + p.numel()].view_as(p)
            p.main_grad = self.grads[start:start + p.numel()].view_as(p)
            p.register_post_accumulate_grad_hook(self.collect)
        self.part = nn.Parameter(flat.chunk(world)[rank].clone())
        self.optimizer = adamw([self.part])
        self.wrong = wrong

    @staticmethod
    def collect(p):
        p.main_grad.add_(p.grad)
        p.grad = None

    def step(self):
        world = dist.get_world_size()
        own = torch.empty(self.padded // world)
        dist.reduce_scatter_tensor(own, self.grads, op=dist.ReduceOp.SUM)
        norm = own.square().sum()
        dist.all_reduce(norm)
        norm = norm.sqrt()
        self.part.grad = own * (0.1 / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step()
        dist.all_gather_into_tensor(self.buffer, self.part.detach().to(torch.bfloat16))
        if not self.wrong:
            self.grads.zero_()
        return norm


def zero1(ref, wrong):
    import trainverify as tv
    from data_parallel import tokens_of
    from smallgpt import loss_of
    model, data = load(ref), mine(ref)
    flat = Flat(model, wrong)

    def step():
        loss = loss_of(model(data["tokens"]).float(), data["labels"], reduction="sum") / tokens_of(data)
        loss.backward()
        return {"loss": tv.local(loss, reduce="sum"), "norm": flat.step()}

    return tv.Training(model, step)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
