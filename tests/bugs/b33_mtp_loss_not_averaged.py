"""Megatron-LM issue 1532: the loss of the head that predicts the token after the next is summed over tokens, where the main loss is a mean."""
import torch
from kit import HIDDEN, IGNORE, VOCAB, Net, load, loss_of, mesh_of, rows_of, single, sum_grads, total, training, valid
from torch import nn

RANKS = 3
BUG = {"id": "B33", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1532", "diagnosis": "multiple",
       "line": "mtp = loss_of(after_next, later, \"sum\")",
       "also": ["loss = main + 0.3 * mtp", "dist.all_reduce(p.grad, group=group)", "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)"]}


class MtpNet(Net):
    def __init__(self):
        super().__init__()
        self.mtp = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.norm(self.hidden(self.embed(tokens)))
        return self.head(x), self.mtp(x)


def later_of(labels):
    """The labels one further on; the last position has none."""
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), 1)


def both(model, batch):
    logits, after_next = model(batch["tokens"])
    return loss_of(logits, batch["labels"]) + 0.3 * loss_of(after_next, later_of(batch["labels"]))


def reference():
    return single(MtpNet, both)


def parallel(ref, fixed=False):
    mesh_of(dp=3)
    model = load(MtpNet(), ref.weights)
    tokens, labels = rows_of(ref.batch, None)
    later = later_of(labels)

    def backward():
        logits, after_next = model(tokens)
        main = loss_of(logits, labels, "sum") / total(valid(labels))
        mtp = loss_of(after_next, later, "sum")
        mtp = mtp / total(valid(later)) if fixed else mtp
        loss = main + 0.3 * mtp
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
