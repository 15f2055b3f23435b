"""Megatron-Bridge issue 5411: with sequence parallelism in bfloat16 the gradient's norm drifts by 9.8 percent, from roundings in another order.
Both programs are equal over the real numbers: a negative control."""
from kit import TP_SHARDS, Net, SequenceNet, TpMlp, finalize, load, mark, mesh_of, replicated, single, tp_training

RANKS = 6
BUG = {"id": "X5", "link": "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/5411", "control": True}


def reference():
    return single(lambda: Net().bfloat16())


def parallel(ref, fixed=False):
    """fixed: the same without sequence parallelism."""
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = Net(mlp=lambda: TpMlp(tp)) if fixed else SequenceNet(tp, mlp=lambda: TpMlp(tp, sequence=True))
    load(model.bfloat16(), ref.weights, tp, TP_SHARDS)
    if not fixed:
        mark(*(p for p in replicated(model) if p is not model.head.weight))
    return tp_training(ref, model, dp, tp, after=None if fixed else lambda: finalize(model, tp, dp))
