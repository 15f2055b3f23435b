"""Megatron-LM issue 599 (fixed by PR 619): the router of SwitchMLP is a plain linear layer that sees this rank's part of the sequence.
It lacks the mark by which the gradients of such parameters are summed over the tensor-parallel ranks."""
import torch.distributed as dist
from kit import EXPERTS, FFN, Gather, Moe, Net, ReduceScatter, SequenceNet, finalize, load, mark, mesh_of, single, tp_training

RANKS = 6
BUG = {"id": "A2", "link": "https://github.com/NVIDIA/Megatron-LM/issues/599", "diagnosis": "partial sum",
       "line": "scores = self.router(x)", "also": ["sum_grads(model.parameters(), dp)", "rest = [p.grad"]}
SHARDS = {"w1": 2, "w2": 1}


def reference():
    return single(lambda: Net(mlp=Moe))


class SwitchMlp(Moe):
    """The router sees this rank's part of the sequence; the experts, whose hidden dimension is split, see all of it."""

    def __init__(self, tp):
        super().__init__(EXPERTS, FFN // dist.get_world_size(tp))
        self.tp = tp

    def run(self, x, weights):
        x, weights = (Gather.apply(t, self.tp, 1, True) for t in (x, weights))
        return ReduceScatter.apply(super().run(x, weights), self.tp, 1)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(SequenceNet(tp, mlp=lambda: SwitchMlp(tp)), ref.weights, tp, SHARDS)
    mark(model.embed.weight, *model.norm.parameters(), *model.layers[0].norm2.parameters())
    if fixed:
        mark(model.layers[0].mlp.router.weight)
    return tp_training(ref, model, dp, tp, after=lambda: finalize(model, tp, dp), shards=SHARDS)
