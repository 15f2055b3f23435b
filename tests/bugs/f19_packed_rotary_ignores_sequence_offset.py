"""Megatron-LM PR 5243: with packed sequences each context rank holds a piece from the front and one from the back of every sequence. The
rotary table may have a row per packed token, but rows were picked as if every sequence began at row 0: all sequences but the
first got the first one's rows."""
import torch
import torch.nn.functional as F
from kit import Attention, Gather, Net, load, loss_of, make_batch, mesh_of, single, sum_grads, total, training, valid
from kit_steps import rotary_table, rotate

RANKS = 3
SEQUENCES = [12, 24, 12, 24]                  # lengths of the packed sequences; positions go on from one to the next
BUG = {"id": "F19", "link": "https://github.com/NVIDIA/Megatron-LM/pull/5243", "diagnosis": "other",
       "line": "rows = zigzag(", "also": ["q, k = (rotate(t, self.table) for t in (q, k))", "return torch.cat((a * cos - b * sin"]}


class PackedAttention(Attention):
    """Causal within each sequence. place: of this rank's tokens in the pack; order: of all tokens as gathered over the ranks."""

    table = place = order = cp = None

    def attend(self, q, k, v):
        q, k = (rotate(t, self.table) for t in (q, k))
        if self.cp is not None:
            k, v = (Gather.apply(t, self.cp, 2, True) for t in (k, v))
        sequence = torch.arange(len(SEQUENCES)).repeat_interleave(torch.tensor(SEQUENCES))
        mask = (sequence[self.place].unsqueeze(-1) == sequence[self.order]) & (self.place.unsqueeze(-1) >= self.order)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def packed(batch):
    return {k: v.reshape(1, -1) for k, v in batch.items()}


def pack_table():
    """Rows for every packed token; sequence i turns i + 1 times as fast (a scaling that depends on the sequence)."""
    tables = [rotary_table(n * (i + 1)) for i, n in enumerate(SEQUENCES)]
    return [torch.cat([t[part][:: i + 1] for i, t in enumerate(tables)]) for part in (0, 1)]


def zigzag(rank, n, offsets):
    """Of every sequence the rank-th piece from the front and from the back, of 2 n pieces."""
    rows = []
    for start, length in zip(offsets, SEQUENCES):
        pieces = (start + torch.arange(length)).chunk(2 * n)
        rows += [pieces[rank], pieces[-1 - rank]]
    return torch.cat(rows)


def reference():
    def loss(model, batch):
        PackedAttention.place = PackedAttention.order = torch.arange(sum(SEQUENCES))
        PackedAttention.table = pack_table()
        return loss_of(model(batch["tokens"]), batch["labels"])

    return single(lambda: Net(attention=PackedAttention), loss=loss, batch=packed(make_batch()))


def parallel(ref, fixed=False):
    mesh = mesh_of(cp=3)
    cp = mesh.get_group()
    starts = [sum(SEQUENCES[:i]) for i in range(len(SEQUENCES))]
    model = load(Net(attention=PackedAttention), ref.weights)
    PackedAttention.cp, PackedAttention.place = cp, zigzag(cp.rank(), RANKS, starts)
    PackedAttention.order = torch.cat([zigzag(r, RANKS, starts) for r in range(RANKS)])
    rows = zigzag(cp.rank(), RANKS, starts if fixed else [0] * len(SEQUENCES))
    tokens, labels = (ref.batch[k][:, PackedAttention.place] for k in ("tokens", "labels"))

    def backward():
        PackedAttention.table = [t[rows] for t in pack_table()]
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
