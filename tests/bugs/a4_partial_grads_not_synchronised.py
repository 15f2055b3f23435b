"""ColossalAI pull request 4926: shardformer's sequence parallelism left the gradients of all layer norms as each rank had computed them
from its part of the sequence; the plugin only averaged over the data-parallel ranks."""
import torch.distributed as dist
from kit import TP_SHARDS, SequenceNet, TpMlp, load, mesh_of, replicated, single, sum_grads, tp_training
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

RANKS = 6
BUG = {"id": "A4", "link": "https://github.com/hpcaitech/ColossalAI/pull/4926", "diagnosis": "partial sum",
       "line": "x = self.norm(self.hidden(", "also": ["self.mlp(self.norm2(x))", "sum_grads(self.model.parameters(), self.dp)", "rest = [p.grad"]}
reference = single


class Plugin:
    """What follows the backward: partial gradients over the sequence-parallel ranks in one flat buffer, then data parallelism."""

    def __init__(self, model, dp, tp, norms):
        self.model, self.dp, self.tp, self.norms = model, dp, tp, norms

    def sync_gradients(self):
        partial = [p for p in replicated(self.model) if p is not self.model.head.weight]
        if not self.norms:
            norm_parameters = {p for m in self.model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
            partial = [p for p in partial if p not in norm_parameters]
        flat = _flatten_dense_tensors([p.grad for p in partial])
        dist.all_reduce(flat, group=self.tp)
        for p, grad in zip(partial, _unflatten_dense_tensors(flat, [p.grad for p in partial])):
            p.grad.copy_(grad)
        sum_grads(self.model.parameters(), self.dp)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(SequenceNet(tp, mlp=lambda: TpMlp(tp, sequence=True)), ref.weights, tp, TP_SHARDS)
    return tp_training(ref, model, dp, tp, after=Plugin(model, dp, tp, norms=fixed).sync_gradients)
