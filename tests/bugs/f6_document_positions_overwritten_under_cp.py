"""torchtitan PR 2780: packed sequences come with positions that start anew in every document. Context parallelism made positions of its
own, 0, 1, 2, ... over the whole sequence, and put them in their place before it cut the inputs. The mask, which takes a 0 for
the start of a document, then lets tokens attend across documents."""
import torch
import torch.nn.functional as F
from kit import Attention, Gather, Net, cp_shares, load, loss_of, make_batch, mesh_of, part, single, sum_grads, total, training, valid
from kit_steps import rotary_table, rotate

RANKS = 6
BUG = {"id": "F6", "link": "https://github.com/pytorch/torchtitan/pull/2780", "diagnosis": "other",
       "line": "positions = torch.arange(", "also": ["return F.scaled_dot_product_attention(", "return torch.cat((a * cos - b * sin"]}


class PackedAttention(Attention):
    """Causal within each document. positions: of this rank's tokens; all_positions: of all tokens of its rows."""

    cp = positions = all_positions = None

    def attend(self, q, k, v):
        table = [t[self.positions].unsqueeze(1) for t in rotary_table(self.all_positions.shape[1])]
        q, k = (rotate(t, table) for t in (q, k))
        documents = (self.all_positions == 0).cumsum(1)
        place = torch.arange(documents.shape[1])
        mask = (place.unsqueeze(-1) >= place) & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
        if self.cp is not None:
            k, v = (Gather.apply(t, self.cp, 2, True) for t in (k, v))
            mask = part(mask, self.cp, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))


def packed_batch():
    batch = make_batch()
    rows, length = batch["tokens"].shape
    starts = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        starts[row, [3 + row % 4, 8 + row % 3]] = 1
    place = torch.arange(length).expand(rows, -1)
    return batch | {"positions": place - (starts * place).cummax(1).values}


def reference():
    def loss(model, batch):
        PackedAttention.positions = PackedAttention.all_positions = batch["positions"]
        return loss_of(model(batch["tokens"]), batch["labels"])

    return single(lambda: Net(attention=PackedAttention), loss=loss, batch=packed_batch())


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp = mesh.get_group("dp"), mesh.get_group("cp")
    model = load(Net(attention=PackedAttention), ref.weights)
    tokens, labels = cp_shares(ref.batch, dp, cp)
    positions = part(ref.batch["positions"], dp)
    if not fixed:
        positions = torch.arange(positions.shape[1]).expand_as(positions)
    PackedAttention.cp, PackedAttention.all_positions, PackedAttention.positions = cp, positions, part(positions, cp, 1)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
