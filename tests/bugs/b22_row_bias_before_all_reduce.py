"""text-generation-inference issue 1036 (also Paddle 35186): every rank adds the bias of a row-parallel linear layer to its own
share, so that the all-reduce sums as many biases as there are ranks."""
import torch.nn.functional as F
from kit import TP_SHARDS, Copy, Net, Reduce, TpMlp, load, mesh_of, single, tp_training

RANKS = 6
BUG = {"id": "B22", "link": "https://github.com/huggingface/text-generation-inference/issues/1036", "diagnosis": "additive term",
       "line": "Reduce.apply(F.linear(y, self.down.weight, self.down.bias), self.tp)", "also": ["return total(x, group)"],
       "missed": ["diagnosis"]}
reference = single


class BiasedMlp(TpMlp):
    def forward(self, x):
        y = F.gelu(self.up(Copy.apply(x, self.tp)))
        return Reduce.apply(F.linear(y, self.down.weight, self.down.bias), self.tp)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(mlp=lambda: (TpMlp if fixed else BiasedMlp)(tp)), ref.weights, tp, TP_SHARDS)
    return tp_training(ref, model, dp, tp)
