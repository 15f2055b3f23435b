"""One spec, many ways to run it: each function is a case, on RANKS ranks."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv

sys.path.insert(0, str(Path(__file__).parent))
from tiny import LAYERS, LENGTH, ROWS, Model, Stage, batch, loss_of, reference, training  # noqa: E402, F401


def RANKS(how):
    return 4 if how == "hybrid" else 2


def loaded(ref, **kw):
    model = Model(**kw)
    model.load_state_dict(ref.weights)
    return model


def share(ref, parts=None, part=None):
    n, r = parts or dist.get_world_size(), dist.get_rank() if part is None else part
    return {k: v.chunk(n)[r] for k, v in ref.batch.items()}


def averaged(training_):
    """Every rank reports the loss of its own rows."""
    step = training_.step

    def reported():
        out = dict(step())
        out["loss"] = tv.local(out["loss"], reduce="mean")
        return out

    return tv.Training(training_.model, reported)


def ddp(ref, **kw):
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(loaded(ref), **kw)
    return averaged(training(model, list(model.parameters()), share(ref)))


def ddp_accumulate(ref):
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(loaded(ref), gradient_as_bucket_view=True)
    mine = share(ref)
    first, second = ({k: v.chunk(2)[i] for k, v in mine.items()} for i in range(2))

    def backward():
        with model.no_sync():
            a = loss_of(model(first["tokens"]), first["labels"]) / 2
            a.backward()
        b = loss_of(model(second["tokens"]), second["labels"]) / 2
        b.backward()
        return a.detach() + b.detach()

    return averaged(training(model, list(model.parameters()), mine, backward))


def fsdp2(ref, half=False, recompute=False):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    model = loaded(ref, recompute=recompute)
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)} if half else {}
    for layer in model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    return averaged(training(model, list(model.parameters()), share(ref)))


def fsdp2_half(ref):
    return fsdp2(ref, half=True)


def fsdp2_recompute(ref):
    return fsdp2(ref, recompute=True)


def fsdp1(ref):
    from torch.distributed.fsdp import FullyShardedDataParallel
    model = loaded(ref)
    for i, layer in enumerate(model.layers):
        model.layers[i] = FullyShardedDataParallel(layer, use_orig_params=True)
    model = FullyShardedDataParallel(model, use_orig_params=True)
    return averaged(training(model, list(model.parameters()), share(ref), clip=model.clip_grad_norm_))


def tp_sp(ref):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, loss_parallel,
                                                   parallelize_module)
    model = loaded(ref)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("tp",))
    whole = dict(desired_input_layouts=(Replicate(),), input_layouts=(Shard(1),))
    parallelize_module(model, mesh, {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)})
    for layer in model.layers:
        parallelize_module(layer, mesh, {
            "norm1": SequenceParallel(), "norm2": SequenceParallel(),
            "attention": PrepareModuleInput(**whole), "attention.q": ColwiseParallel(), "attention.k": ColwiseParallel(),
            "attention.v": ColwiseParallel(), "attention.o": RowwiseParallel(output_layouts=Shard(1)),
            "mlp": PrepareModuleInput(**whole), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel(output_layouts=Shard(1))})

    def backward():
        with loss_parallel():
            loss = loss_of(model(ref.batch["tokens"]), ref.batch["labels"])
            loss.backward()
        return loss

    return training(model, list(model.parameters()), ref.batch, backward)


class CopyToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous().clone()
        dist.all_reduce(g)
        return g


class SumOverAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous().clone()
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        return x

    @staticmethod
    def backward(ctx, g):
        return g


class SplitMlp(nn.Module):
    """Column then row parallel, by hand."""

    def __init__(self):
        super().__init__()
        n = dist.get_world_size()
        self.up, self.down = nn.Linear(8, 12 // n, bias=False), nn.Linear(12 // n, 8, bias=False)

    def forward(self, x):
        return SumOverAll.apply(self.down(F.silu(self.up(CopyToAll.apply(x)))))


def by_hand_tp(ref):
    n, r = dist.get_world_size(), dist.get_rank()
    model = Model(mlp=SplitMlp)
    for name, p in model.named_parameters():
        full = ref.weights[name]
        with torch.no_grad():
            p.copy_(full.chunk(n, 0)[r] if ".up." in name else full.chunk(n, 1)[r] if ".down." in name else full)
    return training(model, list(model.parameters()), ref.batch, clip=False)


def pipeline(ref, schedule="gpipe"):
    from torch.distributed import pipelining as pp
    rank, world = dist.get_rank(), dist.get_world_size()
    per_rank = 2 if schedule == "interleaved" else 1
    model, stages = loaded(ref), world * per_rank
    size = LAYERS // stages
    own = [pp.PipelineStage(Stage(model, i * size, (i + 1) * size, i == 0, i == stages - 1), i, stages, torch.device("cpu"))
           for i in range(rank, stages, world)]
    kind = {"gpipe": pp.ScheduleGPipe, "1f1b": pp.Schedule1F1B, "interleaved": pp.ScheduleInterleaved1F1B}[schedule]
    run = kind(own if per_rank > 1 else own[0], 4, loss_fn=loss_of)
    chunks = [s.submod for s in own]
    parameters = [p for c in chunks for p in c.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def step():
        losses = []
        more = {"target": ref.batch["labels"], "losses": losses} if rank == world - 1 else {}
        run.step(*((ref.batch["tokens"],) if rank == 0 else ()), **more)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": torch.stack(losses).mean()} if losses else None

    return tv.Training(chunks, step)


def pipeline_1f1b(ref):
    return pipeline(ref, "1f1b")


def pipeline_interleaved(ref):
    return pipeline(ref, "interleaved")


def context_parallel(ref, rotate="allgather"):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as split
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    set_rotate_method(rotate)
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), loaded(ref)
    parameters = list(model.parameters())

    def backward():
        tokens, labels = ref.batch["tokens"].clone(), ref.batch["labels"].clone()
        with split(mesh, buffers=[tokens, labels], buffer_seq_dims=[1, 1], no_restore_buffers={tokens, labels}):
            loss = loss_of(model(tokens), labels)
            loss.backward()
        for p in parameters:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        return loss

    return averaged(training(model, parameters, ref.batch, backward))


def context_parallel_alltoall(ref):
    return context_parallel(ref, "alltoall")


def zero(ref):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(loaded(ref))
    make = lambda parameters, lr: ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=lr)  # noqa: E731
    return averaged(training(model, list(model.parameters()), share(ref), optimizer=make))


def ddp_hook(ref):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(loaded(ref))
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    return averaged(training(model, list(model.parameters()), share(ref)))


def hybrid(ref):
    """FSDP2 within two replicas, gradients divided by a factor of the user's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh, model = init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard")), loaded(ref)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    model.set_gradient_divide_factor(4.0)
    return averaged(training(model, list(model.parameters()), share(ref)))


def amp(ref):
    """Mixed precision with loss scaling, written for a GPU."""
    model = loaded(ref).cuda()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.amp.GradScaler("cuda")
    data = {k: v.to("cuda:0") for k, v in ref.batch.items()}

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(model(data["tokens"]), data["labels"])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return {"loss": loss}
    return tv.Training(model, step)


def parallel(ref, how):
    return globals()[how](ref)
