"""NeMo Automodel pull request 3822: with the tensor-parallel plans of transformers, parameters that are the same on all ranks were updated by
each rank's own gradients. The norm of queries and keys is applied to this rank's heads only, so that its gradient is a share (a sum
is missing); other replicated parameters see the same on all ranks."""
import torch.distributed as dist
from kit import HEAD_DIM, HEADS, TP_SHARDS, Attention, Copy, Net, Reduce, TpMlp, load, mesh_of, single, sum_grads, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "A19", "link": "https://github.com/NVIDIA-NeMo/Automodel/pull/3822", "diagnosis": "partial sum",
       "line": "super().attend(self.q_norm(q), self.k_norm(k), v)", "also": ["sum_grads(model.parameters(), dp)", "rest = [p.grad"]}


class NormedAttention(Attention):
    def __init__(self, tp=None):
        super().__init__(HEADS // (dist.get_world_size(tp) if tp else 1))
        self.tp, self.q_norm, self.k_norm = tp, nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def attend(self, q, k, v):
        return super().attend(self.q_norm(q), self.k_norm(k), v)

    def forward(self, x):
        return Reduce.apply(super().forward(Copy.apply(x, self.tp)), self.tp) if self.tp else super().forward(x)


def reference():
    return single(lambda: Net(attention=NormedAttention))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(attention=lambda: NormedAttention(tp), mlp=lambda: TpMlp(tp)), ref.weights, tp, TP_SHARDS)

    def finish():
        if fixed:
            sum_grads([p for name, p in model.named_parameters() if "_norm." in name], tp)
        sum_grads(model.parameters(), dp)

    return tp_training(ref, model, dp, tp, after=finish)
