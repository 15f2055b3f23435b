"""Megatron-LM issue 1754: with a vocabulary that tensor parallelism does not divide evenly the loss differs from that of one device. The cause is
not confirmed there; here each rank takes all shards to be as long as its own, and the last rank's is shorter."""
from kit import HIDDEN, IGNORE, TP_SHARDS, VOCAB, Copy, Net, Reduce, TpMlp, clip_sharded, load, mesh_of, rows_of, sharded, single, sum_grads, total
from kit import training, valid
from torch import nn

RANKS = 6
BUG = {"id": "E9", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1754", "diagnosis": "other",
       "line": "target = logits.gather(-1, index)", "also": ["return total(x, group)"]}
SHARDS = {**TP_SHARDS, "head.weight": 0}
reference = single


class VocabNet(Net):
    """This rank's rows of the output layer."""

    def __init__(self, tp, fixed):
        super().__init__(mlp=lambda: TpMlp(tp))
        longest = -(-VOCAB // tp.size())
        own = min(longest, VOCAB - tp.rank() * longest)
        self.tp, self.first = tp, tp.rank() * (longest if fixed else own)
        self.head = nn.Linear(HIDDEN, own, bias=False)

    def loss(self, tokens, labels):
        """The sum over all tokens."""
        logits = self.head(Copy.apply(self.norm(self.hidden(self.embed(tokens))), self.tp))
        local = labels - self.first
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        index = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        target = logits.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)
        normaliser = Reduce.apply(logits.exp().sum(-1), self.tp).log()
        return ((normaliser - Reduce.apply(target, self.tp)) * (labels != IGNORE)).sum()


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(VocabNet(tp, fixed), ref.weights, tp, SHARDS)
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = model.loss(tokens, labels) / total(valid(labels), dp)
        loss.backward()
        sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, SHARDS), tp))
