"""The first bug of https://arxiv.org/abs/2506.09280, a vocabulary-parallel embedding in Megatron-LM with a wrong mask: here the test for
ids that are outside of this rank's shard is off by one, so that the first id of the next shard takes a row on two ranks."""
import torch
import torch.nn.functional as F
from kit import HIDDEN, VOCAB, Net, Reduce, load, mesh_of, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "E4", "link": "https://arxiv.org/abs/2506.09280", "diagnosis": "additive term",
       "line": "return Reduce.apply(x.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp)",
       "also": ["x = F.embedding(local, self.weight)", "return total(x, group)", "dist.all_reduce(x, group=group)"],
       "missed": ["diagnosis"]}
reference = single


class VocabEmbedding(nn.Module):
    def __init__(self, tp, fixed):
        super().__init__()
        self.tp, self.fixed, own = tp, fixed, VOCAB // tp.size()
        self.start, self.end = own * tp.rank(), own * (tp.rank() + 1)
        self.weight = nn.Parameter(torch.empty(own, HIDDEN))

    def forward(self, ids):
        beyond = ids >= self.end if self.fixed else ids > self.end
        elsewhere = (ids < self.start) | beyond
        local = (ids - self.start).masked_fill(elsewhere, 0).clamp(max=len(self.weight) - 1)
        x = F.embedding(local, self.weight)
        return Reduce.apply(x.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = Net()
    model.embed = VocabEmbedding(tp, fixed)
    load(model, ref.weights, tp, {"embed.weight": 0})
    return tp_training(ref, model, dp, tp, shards={"embed.weight": 0})
