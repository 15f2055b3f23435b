"""Megatron-LM issue 7452 (its second finding): the output layer gathers its logits over the tensor-parallel ranks, and a vocabulary-parallel loss
takes the whole for this rank's part. The normaliser counts every word once per rank, and the loss is off by log(TP)."""
from kit import HIDDEN, IGNORE, TP_SHARDS, VOCAB, Copy, Gather, Net, Reduce, TpMlp, clip_sharded, load, mesh_of, rows_of, sharded, single, sum_grads
from kit import total, training, valid
from torch import nn

RANKS = 6
BUG = {"id": "E11", "link": "https://github.com/NVIDIA/Megatron-LM/issues/7452", "diagnosis": "other",
       "line": "normaliser = Reduce.apply(logits.exp().sum(-1), tp).log()", "also": ["dist.all_reduce(x, group=group)"]}
SHARDS = {**TP_SHARDS, "head.weight": 0}
reference = single


def vocabulary_loss(logits, labels, tp):
    """The sum of the losses of all tokens, from this rank's part of the vocabulary."""
    local = labels - tp.rank() * logits.shape[-1]
    elsewhere = (local < 0) | (local >= logits.shape[-1])
    target = logits.gather(-1, local.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
    normaliser = Reduce.apply(logits.exp().sum(-1), tp).log()
    return ((normaliser - Reduce.apply(target, tp)) * (labels != IGNORE)).sum()


class VocabNet(Net):
    def __init__(self, tp, gather_output):
        super().__init__(mlp=lambda: TpMlp(tp))
        self.tp, self.gather_output = tp, gather_output
        self.head = nn.Linear(HIDDEN, VOCAB // tp.size(), bias=False)

    def forward(self, tokens):
        logits = self.head(Copy.apply(self.norm(self.hidden(self.embed(tokens))), self.tp))
        return Gather.apply(logits, self.tp, -1, False) if self.gather_output else logits


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(VocabNet(tp, gather_output=not fixed), ref.weights, tp, SHARDS)
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = vocabulary_loss(model(tokens), labels, tp) / total(valid(labels), dp)
        loss.backward()
        sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, SHARDS), tp))
