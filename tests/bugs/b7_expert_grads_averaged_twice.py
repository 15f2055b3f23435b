"""DeepSpeed pull request 4957: after a refactoring of ZeRO's reduction, gradients of experts were divided before they are put into the
bucket of their group, and the bucket was averaged once more after its all-reduce."""
import torch.distributed as dist
from kit import EP_SHARDS, EpMoe, Moe, Net, ep_training, load, make_batch, mesh_of, single
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

RANKS = 6
BUG = {"id": "B7", "link": "https://github.com/deepspeedai/DeepSpeed/pull/4957", "diagnosis": "multiple",
       "line": "p.grad.copy_(reduced)",
       "also": ["bucket /= group.size()", "dist.all_reduce(bucket, group=group)", "square = nn.utils.get_total_norm([p.grad for p in sharded])"]}


def reference():
    return single(lambda: Net(mlp=Moe), batch=make_batch(12, 10))


def average_bucket(parameters, divisor, group, averaged_already):
    """The gradients divided, through one flat bucket over the group, and back."""
    bucket = _flatten_dense_tensors([p.grad / divisor for p in parameters])
    dist.all_reduce(bucket, group=group)
    if not averaged_already:
        bucket /= group.size()
    for p, reduced in zip(parameters, _unflatten_dense_tensors(bucket, [p.grad for p in parameters])):
        p.grad.copy_(reduced)


def parallel(ref, fixed=False):
    mesh = mesh_of(edp=3, ep=2)
    edp, ep = mesh.get_group("edp"), mesh.get_group("ep")
    model = load(Net(mlp=lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    return ep_training(ref, model, ep, lambda experts: average_bucket(experts, mesh.size(), edp, averaged_already=fixed))
