"""PaddleFleetX pull request 1005 (also InternLM 405): tensor-parallel ranks draw dropout masks from one seed where sequence parallelism needs
different ones. Weights come from the checkpoint and dropout is off, so that no seed reaches a value: a negative control."""
import torch
from kit import TP_SHARDS, SequenceNet, TpMlp, finalize, load, mark, mesh_of, replicated, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "X2", "link": "https://github.com/PaddlePaddle/PaddleFleetX/pull/1005", "control": True}
reference = single


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    torch.manual_seed(7 + dp.rank() + (100 * tp.rank() if fixed else 0))
    model = SequenceNet(tp, mlp=lambda: TpMlp(tp, sequence=True))
    model.layers[0].norm2 = nn.Sequential(model.layers[0].norm2, nn.Dropout(0.0))
    weights = {name.replace("norm2.", "norm2.0."): w for name, w in ref.weights.items()}
    load(model, weights, tp, TP_SHARDS)
    mark(*(p for p in replicated(model) if p is not model.head.weight))
    return tp_training(ref, model, dp, tp, after=lambda: finalize(model, tp, dp))
