"""Megatron-LM issue 1446: with sequence parallelism the gradient of a norm's weight is this rank's share, from its part of the
sequence. Gradients are brought together after the backward for the parameters that carry a mark, and the final norm was made
without it."""
from kit import TP_SHARDS, SequenceNet, TpMlp, finalize, load, mark, mesh_of, single, tp_training

RANKS = 6
BUG = {"id": "A1", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1446", "diagnosis": "partial sum",
       "line": "x = self.norm(self.hidden(", "also": ["sum_grads(model.parameters(), dp)", "rest = [p.grad"]}
reference = single


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(SequenceNet(tp, mlp=lambda: TpMlp(tp, sequence=True)), ref.weights, tp, TP_SHARDS)
    mark(model.embed.weight, *(layer.mlp.down.bias for layer in model.layers))
    for layer in model.layers:
        mark(*layer.norm2.parameters())
    if fixed:
        mark(*model.norm.parameters())
    return tp_training(ref, model, dp, tp, after=lambda: finalize(model, tp, dp))
