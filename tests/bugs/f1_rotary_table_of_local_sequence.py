"""Megatron-LM commit bbfbd6c18d: the length of the rotary table was read off the input of the layers. With sequence parallelism this is
one rank's part of the sequence, so every rank rotated its part as if it were the first. The fix multiplies by the
tensor-parallel degree."""
import torch.distributed as dist
import torch.nn.functional as F
from kit import (HEAD_DIM, HEADS, HIDDEN, Attention, Gather, Net, ReduceScatter, SequenceNet, clip_sharded, load, loss_of, part, replicated,
                 sharded, single, sum_grads, training, valid)
from kit_steps import rotary_table, rotate
from torch import nn

RANKS = 3
SHARDS = {"q.weight": 0, "q.bias": 0, "v.weight": 0, "v.bias": 0, "out.weight": 1}
BUG = {"id": "F1", "link": "https://github.com/NVIDIA/Megatron-LM/commit/bbfbd6c18d", "diagnosis": "other",
       "line": "key = rotate(key, own_rows)", "also": ["rotary_seq_len = x.shape[1]", "return torch.cat((a * cos - b * sin"]}


class LatentAttention(Attention):
    """One key for all heads, as in multi-query and latent attention; queries and values per head."""

    def __init__(self, heads=HEADS):
        super().__init__(heads)
        self.k = nn.Linear(HIDDEN, HEAD_DIM)

    def forward(self, x):
        key = rotate(self.k(x).unsqueeze(1), rotary_table(x.shape[1]))
        return self.out(self.heads_of(x, key))

    def heads_of(self, x, key):
        q, v = (w(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for w in (self.q, self.v))
        q = rotate(q, rotary_table(q.shape[2]))
        return F.scaled_dot_product_attention(q, key.expand_as(q), v, is_causal=True).transpose(1, 2).flatten(2)


class SequenceParallelAttention(LatentAttention):
    """The key is computed from this rank's part of the sequence and gathered; queries and values are this rank's heads."""

    def __init__(self, tp, fixed):
        super().__init__(HEADS // tp.size())
        self.tp, self.fixed = tp, fixed

    def forward(self, x):
        rotary_seq_len = x.shape[1]
        if self.fixed:
            rotary_seq_len *= self.tp.size()
        table = rotary_table(rotary_seq_len)
        own_rows = [part(t, self.tp) for t in table] if self.fixed else table
        key = self.k(x).unsqueeze(1)
        key = rotate(key, own_rows)
        key = Gather.apply(key, self.tp, 2, True)
        return ReduceScatter.apply(self.out(self.heads_of(Gather.apply(x, self.tp, 1, True), key)), self.tp, 1)


def reference():
    return single(lambda: Net(attention=LatentAttention))


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    tp = dist.group.WORLD
    model = load(SequenceNet(tp, attention=lambda: SequenceParallelAttention(tp, fixed)), ref.weights, tp, SHARDS)
    tokens, labels = ref.batch["tokens"], ref.batch["labels"]

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / valid(labels)
        loss.backward()
        sum_grads([p for p in replicated(model, SHARDS) if p is not model.head.weight], tp)
        return loss.detach()

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, SHARDS), tp))
