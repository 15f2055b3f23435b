"""transformers pull request 48205: all expert-parallel ranks compute the same router scores and each runs its own experts on all tokens.
The gradient of the scores covers on each rank only the slots of its experts; nothing summed them over the ranks."""
import torch.distributed as dist
from kit import EP_SHARDS, EXPERTS, Copy, Moe, Net, Reduce, load, mesh_of, single, tp_training

RANKS = 6
BUG = {"id": "A12", "link": "https://github.com/huggingface/transformers/pull/48205", "diagnosis": "partial sum",
       "line": "weights.chunk(", "also": ["self.run(x, scores * chosen)", "scores = self.router(x)", "sum_grads(model.parameters(), dp)",
                                          "rest = [p.grad", "y, self.w2, weights)"]}


def reference():
    return single(lambda: Net(mlp=Moe))


class LocalExperts(Moe):
    """This rank's experts on all tokens; the same tokens are on all ranks."""

    def __init__(self, ep, fixed):
        super().__init__(EXPERTS // dist.get_world_size(ep))
        self.ep, self.fixed = ep, fixed

    def run(self, x, weights):
        weights = Copy.apply(weights, self.ep) if self.fixed else weights
        own = weights.chunk(dist.get_world_size(self.ep), -1)[dist.get_rank(self.ep)]
        return Reduce.apply(super().run(Copy.apply(x, self.ep), own), self.ep)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, ep=3)
    dp, ep = mesh.get_group("dp"), mesh.get_group("ep")
    model = load(Net(mlp=lambda: LocalExperts(ep, fixed)), ref.weights, ep, EP_SHARDS)
    return tp_training(ref, model, dp, ep, shards=EP_SHARDS)
