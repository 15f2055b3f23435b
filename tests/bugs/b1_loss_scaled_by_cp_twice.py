"""Megatron-LM issue 673: with context parallelism the loss was multiplied by the number of context-parallel ranks, to make up for the
average that follows. With a loss per token that average is left out (gradients are summed and divided by all tokens), and the
factor stayed."""
from kit import Attention, Gather, Net, load, loss_of, mesh_of, part, rows_of, single, sum_grads, total, training, valid
import torch
import torch.nn.functional as F

RANKS = 6
BUG = {"id": "B1", "link": "https://github.com/NVIDIA/Megatron-LM/issues/673", "diagnosis": "multiple",
       "line": "(loss_sum * scale).backward()", "also": ["p.grad /= tokens", "sum_grads(model.parameters(), group)"]}


def reference():
    return single(lambda: Net(attention=Attention))


class ContextAttention(Attention):
    """This rank's queries, the keys and values of the whole sequence."""

    cp = None

    def attend(self, q, k, v):
        n, rank = self.cp.size(), self.cp.rank()
        k, v = Gather.apply(k, self.cp, 2, True), Gather.apply(v, self.cp, 2, True)
        mask = torch.ones(q.shape[2] * n, k.shape[2], dtype=torch.bool).tril().chunk(n)[rank]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp, group = mesh.get_group("dp"), mesh.get_group("cp"), mesh._flatten("dp_cp").get_group()
    ContextAttention.cp = cp
    model = load(Net(attention=ContextAttention), ref.weights)
    inputs, labels = (part(x, cp, 1) for x in rows_of(ref.batch, dp))
    scale = 1 if fixed else cp.size()

    def backward():
        loss_sum = loss_of(model(inputs), labels, "sum")
        (loss_sum * scale).backward()
        tokens = total(valid(labels), group)
        sum_grads(model.parameters(), group)
        for p in model.parameters():
            p.grad /= tokens
        return total(loss_sum, group) / tokens

    return training(model, backward)
