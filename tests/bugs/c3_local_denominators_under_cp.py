"""prime-rl PR 1957 and 1960: the loss was divided by the tokens of this rank's piece of the sequence, then FSDP averaged over data
and context ranks. Prompts do not count and sit on the first context ranks, so these had the smallest divisor and the largest
weight. The fix divides by the tokens of all ranks and undoes the average."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit import Attention, Gather, Net, load, loss_of, mesh_of, part, rows_of, single, total, training, valid
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

RANKS = 6
BUG = {"id": "C3", "link": "https://github.com/PrimeIntellect-ai/prime-rl/pull/1957", "diagnosis": "reweighted",
       "line": "loss = loss_sum / valid(labels)", "also": ["loss.backward()"]}


def reference():
    return single(lambda: Net(attention=Attention))


class CpAttention(Attention):
    """Queries of this rank's part of the sequence, keys and values of all of it."""

    cp = None

    def attend(self, q, k, v):
        k, v = (Gather.apply(t, self.cp, 2, True) for t in (k, v))
        first = dist.get_rank(self.cp) * q.shape[2]
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(first)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, CpAttention.cp = mesh.get_group("dp"), mesh.get_group("cp")
    model = load(Net(attention=CpAttention), ref.weights)
    fully_shard(model, mesh=mesh._flatten("dp_cp"))
    tokens, labels = (part(t, CpAttention.cp, 1) for t in rows_of(ref.batch, dp))

    def backward():
        loss_sum = loss_of(model(tokens), labels, "sum")
        if fixed:
            loss = loss_sum / total(valid(labels)) * RANKS
        else:
            loss = loss_sum / valid(labels)
        loss.backward()
        return total(loss) / RANKS

    return training(model, backward, clip=lambda ps: clip_grad_norm_(ps, 0.1).full_tensor())
