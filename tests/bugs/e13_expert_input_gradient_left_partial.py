"""torchtitan pull request 1878: the same tokens meet another part of each expert's weights on every tensor-parallel rank. The tokens leave DTensor by
to_local() with its default, which takes their gradient to be replicated; it is a share and has to be summed."""
from kit import EXPERTS, FFN, Copy, Moe, Net, Reduce, load, mesh_of, single, tp_training
from torch.distributed.tensor import DTensor, Partial, Replicate

RANKS = 6
BUG = {"id": "E13", "link": "https://github.com/pytorch/torchtitan/pull/1878", "diagnosis": "partial sum",
       "line": "x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).to_local(",
       "also": ["torch.einsum(\"...h,ehf->...ef\", x, self.w1)", "x + self.mlp(self.norm2(x))"]}
SHARDS = {"w1": 2, "w2": 1}


class TpMoe(Moe):
    """Every expert's hidden dimension is split over the ranks."""

    def __init__(self, mesh, fixed):
        super().__init__(EXPERTS, FFN // mesh.size())
        self.mesh, self.tp, self.grads = mesh, mesh.get_group(), [Partial()] if fixed else None

    def run(self, x, weights):
        x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).to_local(grad_placements=self.grads)
        return Reduce.apply(super().run(x, Copy.apply(weights, self.tp)), self.tp)


def reference():
    return single(lambda: Net(mlp=Moe))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(mlp=lambda: TpMoe(mesh["tp"], fixed)), ref.weights, tp, SHARDS)
    return tp_training(ref, model, dp, tp, shards=SHARDS)
