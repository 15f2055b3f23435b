"""Megatron-LM commit 3373641ff1: after the backward dense gradients are summed over the data-parallel ranks and divided by their number.
Expert gradients, which go over another group, were only summed."""
from kit import EP_SHARDS, EpMoe, Moe, Net, ep_training, load, make_batch, mesh_of, single, sum_grads

RANKS = 6
BUG = {"id": "B3", "link": "https://github.com/NVIDIA/Megatron-LM/commit/3373641ff1", "diagnosis": "multiple",
       "line": "dist.all_reduce(p.grad, group=group)", "also": ["square = nn.utils.get_total_norm([p.grad for p in sharded])"]}


def reference():
    return single(lambda: Net(mlp=Moe), batch=make_batch(12, 10))


def parallel(ref, fixed=False):
    mesh = mesh_of(edp=2, ep=3)
    edp, ep = mesh.get_group("edp"), mesh.get_group("ep")
    model = load(Net(mlp=lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)

    def reduce_experts(experts):
        sum_grads(experts, edp)
        for p in experts if fixed else ():
            p.grad /= mesh.size()

    return ep_training(ref, model, ep, reduce_experts)
