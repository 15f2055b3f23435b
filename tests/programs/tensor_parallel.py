"""Tensor parallelism by torch's own plans, by hand-written DTensor code and by hand-sliced weights, over 2 ranks."""
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from smallgpt import HEAD_DIM, MAX_NORM, Attention, Gpt, Mlp, load, loss_of, reference, training  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

RANKS = 2


def mesh_of():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def local_qkv(model, wrong=False):
    """Fused qkv rows in an order that makes each rank's third of the chunks its own heads (wrong: as they are)."""
    n = dist.get_world_size()
    for layer in model.layers:
        for p in () if wrong else layer.attention.qkv.parameters():
            parts = p.detach().unflatten(0, (3, n, -1)).transpose(0, 1)
            p.data.copy_(parts.reshape(p.shape))


PLAN = {"attention.qkv": ColwiseParallel(), "attention.out": RowwiseParallel(),
        "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}


def step_of(ref, model, **options):
    def backward():
        loss = loss_of(model(ref.batch["tokens"]), ref.batch["labels"])
        loss.backward()
        return loss

    return training(model, backward, **options)


def no_sequence(ref, wrong):
    """TP of the layers without sequence parallelism; the rest stays whole on every rank, in plain tensors."""
    model, mesh = load(ref), mesh_of()
    local_qkv(model, wrong)
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)
    return step_of(ref, model, clip=two_kinds)


def two_kinds(parameters):
    """Clips sharded and plain gradients by the norm of both."""
    norms = [nn.utils.get_total_norm([p.grad for p in parameters if isinstance(p, DTensor) == kind]) for kind in (True, False)]
    norm = torch.stack([norms[0].full_tensor(), norms[1]]).norm()
    for p in parameters:
        p.grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel_loss(ref, wrong):
    """Vocabulary-parallel embedding and loss; everything that no plan shards is replicated by DTensor. 13 words over 2 ranks are uneven."""
    model, mesh = load(ref), mesh_of()
    local_qkv(model)
    plan = {f"layers.{i}.{k}": v for i in range(len(model.layers)) for k, v in PLAN.items()}
    parallelize_module(model, mesh, {
        **plan, "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})

    def backward():
        with loss_parallel():
            loss = loss_of(model(ref.batch["tokens"]), ref.batch["labels"])
            (loss * (2 if wrong else 1)).backward()
        return loss

    return training(model, backward, clip=two_kinds)


class DMlp(Mlp):
    """Column then row parallel, written with DTensors."""

    def forward(self, x):
        x = DTensor.from_local(x, self.up.weight.device_mesh, [Replicate()], run_check=False)
        y = F.gelu(F.linear(x, self.up.weight, self.up.bias), approximate=self.approximate)
        y = F.linear(y, self.down.weight).redistribute(placements=[Replicate()]) + self.down.bias
        return y.to_local(grad_placements=[Replicate()])


def by_dtensor(ref, wrong):
    model, mesh = load(ref, mlp=DMlp), mesh_of()
    places = {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1), "down.bias": Replicate()}
    for layer in model.layers:
        for name, place in places.items():
            module, kind = name.split(".")
            owner = getattr(layer.mlp, module)
            full = getattr(owner, kind)
            if wrong and name == "up.bias":
                full = full.roll(1)
            owner.register_parameter(kind, nn.Parameter(distribute_tensor(full.detach(), mesh, [place])))
    return step_of(ref, model, clip=two_kinds)


class Copy(torch.autograd.Function):
    """To all ranks: the identity forward, a sum backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return dist.nn.functional.all_reduce(grad.contiguous())


class SlicedAttention(Attention):
    """This rank's heads of a fused qkv whose rows were sliced by hand."""

    def __init__(self):
        super().__init__()
        n = dist.get_world_size()
        self.qkv = nn.Linear(self.qkv.in_features, self.qkv.out_features // n)
        self.out = nn.Linear(self.out.in_features // n, self.out.out_features)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for t in self.qkv(Copy.apply(x)).chunk(3, -1))
        own = F.linear(self.attend(q, k, v).transpose(1, 2).flatten(2), self.out.weight)
        return Sum.apply(own) + self.out.bias


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def by_hand(ref, wrong):
    model, n, rank = Gpt(attention=SlicedAttention), dist.get_world_size(), dist.get_rank()
    weights = dict(ref.weights)
    for name, w in ref.weights.items():
        if ".qkv." in name and not wrong:
            weights[name] = torch.cat([part.chunk(n)[rank] for part in w.chunk(3)])
        elif ".qkv." in name:
            weights[name] = w.chunk(n)[rank]
        elif name.endswith("attention.out.weight"):
            weights[name] = w.chunk(n, 1)[rank]
    model.load_state_dict(weights)

    def norm_of_all(parameters):
        split = [p for name, p in model.named_parameters() if ".qkv." in name or name.endswith("attention.out.weight")]
        square = nn.utils.get_total_norm([p.grad for p in split]) ** 2
        dist.all_reduce(square)
        rest = nn.utils.get_total_norm([p.grad for p in parameters if not any(p is s for s in split)])
        norm = (square + rest ** 2).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
        return norm

    return step_of(ref, model, clip=norm_of_all)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
