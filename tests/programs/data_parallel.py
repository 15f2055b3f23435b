"""Data parallelism in its usual forms, against one device: every rank takes its rows, the tokens of all count the same."""
from contextlib import nullcontext

import torch
import torch.distributed as dist
from smallgpt import Gpt, IGNORE, clip, load, loss_of, reference, share, training  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import trainverify as tv

RANKS = lambda how, wrong=False: 4 if how == "hsdp" else 2  # noqa: E731


def tokens_of(data):
    """Counted tokens of all ranks' data."""
    count = (data["labels"] != IGNORE).sum()
    dist.all_reduce(count)
    return count


def run(model, data, wrong, parts=1, before=lambda last: nullcontext(), **options):
    """The step of one rank, over `parts` microbatches; gradients are averaged, so each share counts world times."""
    world = dist.get_world_size()

    def backward():
        total, loss = tokens_of(data), 0.0
        for i in range(parts):
            micro = share(data, parts, i)
            with before(i == parts - 1):
                one = loss_of(model(micro["tokens"]), micro["labels"], reduction="sum") / total
                (one * (1 if wrong else world)).backward()
            loss = loss + one.detach()
        return tv.local(loss, reduce="sum")

    return training(model, backward, **options)


def ddp(ref, wrong, recompute=None, **options):
    model = DDP(load(ref, recompute=recompute), **options)
    return run(model, mine(ref), wrong)


def mine(ref):
    return share(ref.batch, dist.get_world_size(), dist.get_rank())


def static_graph(ref, wrong):
    return ddp(ref, wrong, static_graph=True)


def find_unused(ref, wrong):
    return ddp(ref, wrong, find_unused_parameters=True)


def bucket_view(ref, wrong):
    return ddp(ref, wrong, gradient_as_bucket_view=True, bucket_cap_mb=0.0005)


def bf16_hook(ref, wrong):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    model = DDP(load(ref))
    model.register_comm_hook(None, bf16_compress_hook)
    return run(model, mine(ref), wrong)


def own_hook(ref, wrong):
    def average(state, bucket):
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    model = DDP(load(ref))
    model.register_comm_hook(None, average)
    return run(model, mine(ref), wrong)


def checkpointed(ref, wrong):
    return ddp(ref, wrong, recompute=False)


def checkpointed_reentrant(ref, wrong):
    return ddp(ref, wrong, recompute=True, static_graph=True)


def zero(ref, wrong):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    model = DDP(load(ref))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    return run(model, mine(ref), wrong, optimizer=optimizer)


def fsdp1(ref, wrong, **options):
    model = load(ref)
    for i, layer in enumerate(model.layers):
        model.layers[i] = FSDP(layer, **options)
    model = FSDP(model, **options)
    return run(model, mine(ref), wrong, clip=lambda parameters: model.clip_grad_norm_(0.1))


def fsdp1_original(ref, wrong):
    return fsdp1(ref, wrong, use_orig_params=True)


def fsdp1_flat(ref, wrong):
    return fsdp1(ref, wrong, use_orig_params=False)


def full_norm(parameters):
    return clip(parameters).full_tensor()


def sharded(ref, **options):
    model = load(ref)
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(ref, wrong, **options):
    return run(sharded(ref, **options), mine(ref), wrong, clip=full_norm)


def fsdp2_keep(ref, wrong):
    return fsdp2(ref, wrong, reshard_after_forward=False)


def fsdp2_mixed(ref, wrong):
    return fsdp2(ref, wrong, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp2_accumulate(ref, wrong):
    model = sharded(ref)

    def before(last):
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return run(model, mine(ref), wrong, parts=3, before=before, clip=full_norm)


def hsdp(ref, wrong):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fsdp2(ref, wrong, mesh=mesh)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
