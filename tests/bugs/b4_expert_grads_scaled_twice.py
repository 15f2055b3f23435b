"""Megatron-LM commit c13f08a11b: with grouped expert products the module scaled the gradients of its weights by one over the data-parallel
ranks itself, by a hook, and the buckets of data parallelism scaled them again."""
from kit import EP_SHARDS, EpMoe, Moe, Net, ep_training, load, make_batch, mesh_of, single, sum_grads

RANKS = 6
BUG = {"id": "B4", "link": "https://github.com/NVIDIA/Megatron-LM/commit/c13f08a11b", "diagnosis": "multiple",
       "line": "p.grad *= 1 / mesh.size()",
       "also": ["dist.all_reduce(p.grad, group=group)", "w.register_hook(lambda grad: grad / mesh.size())",
                "square = nn.utils.get_total_norm([p.grad for p in sharded])"]}


def reference():
    return single(lambda: Net(mlp=Moe), batch=make_batch(12, 10))


def parallel(ref, fixed=False):
    mesh = mesh_of(edp=3, ep=2)
    edp, ep = mesh.get_group("edp"), mesh.get_group("ep")
    model = load(Net(mlp=lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    moe = model.layers[0].mlp
    for w in () if fixed else (moe.w1, moe.w2):
        w.register_hook(lambda grad: grad / mesh.size())

    def reduce_experts(experts):
        for p in experts:
            p.grad *= 1 / mesh.size()
        sum_grads(experts, edp)

    return ep_training(ref, model, ep, reduce_experts)
