"""Megatron-LM issue 1256: `with rng and fp8:` enters only the second of the two contexts, so that dropout under sequence parallelism draws from
the wrong random state. Over the real numbers, and without dropout, both programs are the same: a negative control."""
from contextlib import contextmanager, nullcontext

import torch
from kit import TP_SHARDS, SequenceNet, TpMlp, finalize, load, mark, mesh_of, replicated, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "X1", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1256", "control": True}
reference = single


@contextmanager
def forked_rng(seed):
    """A random state of this rank's own."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class DropoutNet(SequenceNet):
    fixed = False

    def __init__(self, tp, **options):
        super().__init__(tp, **options)
        self.dropout = nn.Dropout(0.0)

    def hidden(self, x):
        rng, fp8 = forked_rng(100 + self.tp.rank()), nullcontext()
        if self.fixed:
            with rng, fp8:
                return self.dropout(super().hidden(x))
        with rng and fp8:
            return self.dropout(super().hidden(x))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    DropoutNet.fixed = fixed
    model = load(DropoutNet(tp, mlp=lambda: TpMlp(tp, sequence=True)), ref.weights, tp, TP_SHARDS)
    mark(*(p for p in replicated(model) if p is not model.head.weight))
    return tp_training(ref, model, dp, tp, after=lambda: finalize(model, tp, dp))
