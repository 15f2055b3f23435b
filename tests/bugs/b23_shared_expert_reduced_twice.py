"""vLLM issue 49122 (pull request 49366): the shared expert is a tensor-parallel MLP that sums its output over the ranks itself. Its output is
added to the routed experts' shares, and the sum of both is reduced again."""
import torch.nn.functional as F
from kit import EXPERTS, FFN, HIDDEN, Copy, Moe, Net, Reduce, load, mesh_of, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "B23", "link": "https://github.com/vllm-project/vllm/issues/49122", "diagnosis": "additive term",
       "line": "return Reduce.apply(routed + shared, self.tp)", "also": ["x = x.detach().clone()", "dist.all_reduce(x, group=group)", "return total(x, group)"],
       "missed": ["line", "diagnosis"]}
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
        if not self.fixed:
            shared = Reduce.apply(shared, self.tp)
        return Reduce.apply(routed + shared, self.tp)


def reference():
    return single(lambda: Net(mlp=SharedMoe))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(mlp=lambda: SharedMoe(tp, fixed)), ref.weights, tp, SHARDS)
    return tp_training(ref, model, dp, tp, shards=SHARDS)
