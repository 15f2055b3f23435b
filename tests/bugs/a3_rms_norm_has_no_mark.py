"""Megatron-LM commit 20b7a5489d: LayerNorm marked its parameters as sequence parallel when it was made, RMSNorm, added later, did not. A
model that changed to RMSNorm lost the sum of its norms' gradients over the tensor-parallel ranks."""
from kit import TP_SHARDS, Net, SequenceNet, TpMlp, finalize, load, mark, mesh_of, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "A3", "link": "https://github.com/NVIDIA/Megatron-LM/commit/20b7a5489d", "diagnosis": "partial sum",
       "line": "return x + self.mlp(self.norm2(x))", "also": ["x = self.norm(self.hidden(", "sum_grads(model.parameters(), dp)", "rest = [p.grad"]}


def reference():
    return single(lambda: Net(norm=nn.RMSNorm))


class MarkedLayerNorm(nn.LayerNorm):
    def __init__(self, size):
        super().__init__(size)
        mark(self.weight, self.bias)


class MarkedRMSNorm(nn.RMSNorm):
    def __init__(self, size):
        super().__init__(size)
        mark(self.weight)


def parallel(ref, fixed=False, kind="rms"):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    norms = {"layer": MarkedLayerNorm, "rms": MarkedRMSNorm if fixed else nn.RMSNorm}
    model = load(SequenceNet(tp, mlp=lambda: TpMlp(tp, sequence=True), norm=norms[kind]), ref.weights, tp, TP_SHARDS)
    mark(model.embed.weight, model.layers[0].mlp.down.bias)
    return tp_training(ref, model, dp, tp, after=lambda: finalize(model, tp, dp))
