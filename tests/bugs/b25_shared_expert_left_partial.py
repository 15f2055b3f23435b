"""tpu-inference pull request 3435: the routed experts' output is summed over the tensor-parallel ranks before the shared expert's is added,
which stays each rank's share of it."""
import torch.nn.functional as F
from kit import EXPERTS, FFN, HIDDEN, Copy, Moe, Net, Reduce, load, mesh_of, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "B25", "link": "https://github.com/vllm-project/tpu-inference/pull/3435", "diagnosis": "partial sum",
       "line": "return Reduce.apply(routed, self.tp) + shared", "also": ["shared = self.shared_down("]}
SHARDS = {"w1": 2, "w2": 1, "shared_up.weight": 0, "shared_down.weight": 1}


class SharedMoe(Moe):
    def __init__(self, tp=None, fixed=True):
        self.tp, self.fixed = tp, fixed
        ranks = tp.size() if tp else 1
        super().__init__(EXPERTS, FFN // ranks)
        self.shared_up, self.shared_down = nn.Linear(HIDDEN, 12 // ranks, bias=False), nn.Linear(12 // ranks, HIDDEN, bias=False)

    def run(self, x, weights):
        if self.tp is None:
            return super().run(x, weights) + self.shared_down(F.gelu(self.shared_up(x)))
        x = Copy.apply(x, self.tp)
        routed = super().run(x, Copy.apply(weights, self.tp))
        shared = self.shared_down(F.gelu(self.shared_up(x)))
        if self.fixed:
            return Reduce.apply(routed + shared, self.tp)
        return Reduce.apply(routed, self.tp) + shared


def reference():
    return single(lambda: Net(mlp=SharedMoe))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(mlp=lambda: SharedMoe(tp, fixed)), ref.weights, tp, SHARDS)
    return tp_training(ref, model, dp, tp, shards=SHARDS)
