"""torchtitan pull request 3412: the loss is computed chunk by chunk of the sequence, and the gradients of the chunks are collected before they go
on through the decoder. The output layer is split over the vocabulary, so that each rank has a share of these gradients, which was
taken for the sum."""
import torch
from kit import HIDDEN, IGNORE, TP_SHARDS, VOCAB, Net, Reduce, TpMlp, clip_sharded, load, mesh_of, rows_of, sharded, single, sum_grads, total, training
from kit import valid
from torch import nn

RANKS = 6
BUG = {"id": "E12", "link": "https://github.com/pytorch/torchtitan/pull/3412", "diagnosis": "partial sum",
       "line": "x.backward(grad)", "also": ["logits = model.head(chunk)", "return self.norm(self.hidden(self.embed(tokens)))", "grad = torch.cat("]}
SHARDS, CHUNKS = {**TP_SHARDS, "head.weight": 0}, 3
reference = single


def vocabulary_loss(logits, labels, tp):
    """The sum of the losses of all tokens, from this rank's part of the vocabulary."""
    local = labels - tp.rank() * logits.shape[-1]
    elsewhere = (local < 0) | (local >= logits.shape[-1])
    target = logits.gather(-1, local.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
    normaliser = Reduce.apply(logits.exp().sum(-1), tp).log()
    return ((normaliser - Reduce.apply(target, tp)) * (labels != IGNORE)).sum()


class Decoder(Net):
    def forward(self, tokens):
        return self.norm(self.hidden(self.embed(tokens)))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = Decoder(mlp=lambda: TpMlp(tp))
    model.head = nn.Linear(HIDDEN, VOCAB // tp.size(), bias=False)
    load(model, ref.weights, tp, SHARDS)
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        count, reported = total(valid(labels), dp), 0
        x = model(tokens)
        chunks = [c.detach().requires_grad_() for c in x.chunk(CHUNKS, 1)]
        for chunk, mine in zip(chunks, labels.chunk(CHUNKS, 1)):
            logits = model.head(chunk)
            loss = vocabulary_loss(logits, mine, tp) / count
            loss.backward()
            reported += loss.detach()
        grad = torch.cat([c.grad for c in chunks], 1)
        if fixed:
            grad = total(grad, tp)
        x.backward(grad)
        sum_grads(model.parameters(), dp)
        return total(reported, dp)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, SHARDS), tp))
