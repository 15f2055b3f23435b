"""Megatron-LM commit 38ca18b27f: a layer of experts gathered the sequence-parallel parts of its tokens over the group of tensor and data
ranks, also without expert parallelism. The experts' partial results of other replicas' tokens came back in the reduce-scatter:
every replica computes all tokens, and they are added up."""
import torch.distributed as dist
from kit import (EXPERTS, FFN, Gather, Moe, Net, ReduceScatter, SequenceNet, clip_sharded, load, loss_of, mesh_of, replicated, rows_of, sharded,
                 single, sum_grads, total, training, valid)

RANKS = 6
SHARDS = {"w1": 2, "w2": 1}
BUG = {"id": "F13", "link": "https://github.com/NVIDIA/Megatron-LM/commit/38ca18b27f", "diagnosis": "multiple",
       "line": "return ReduceScatter.apply(y, self.group, 1)",
       "also": ["x, weights = (Gather.apply(", "return x + self.mlp(self.norm2(x))"]}


class SequenceMoe(Moe):
    """The whole sequence through this rank's slice of every expert."""

    def __init__(self, tp, group):
        super().__init__(EXPERTS, FFN // tp.size())
        self.group = group

    def run(self, x, weights):
        x, weights = (Gather.apply(t, self.group, 1, True) for t in (x, weights))
        y = super().run(x, weights)
        return ReduceScatter.apply(y, self.group, 1)


def reference():
    return single(lambda: Net(Moe))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    tp_and_dp = dist.group.WORLD
    model = load(SequenceNet(tp, mlp=lambda: SequenceMoe(tp, tp if fixed else tp_and_dp)), ref.weights, tp, SHARDS)
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        sum_grads([p for p in replicated(model, SHARDS) if p is not model.head.weight], tp)
        sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, SHARDS), tp))
