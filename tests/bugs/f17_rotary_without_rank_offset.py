"""Megatron-DeepSpeed PR 392: with Ulysses sequence parallelism each rank rotates queries and keys of its part of the sequence before
they are traded for heads. It started at position 0 on every rank."""
import torch.nn.functional as F
from kit import AllToAll, Net, cp_shares, load, loss_of, mesh_of, part, single, sum_grads, total, training, valid
from kit_steps import RotaryAttention, rotary_table, rotate

RANKS = 6
BUG = {"id": "F17", "link": "https://github.com/deepspeedai/Megatron-DeepSpeed/pull/392", "diagnosis": "other",
       "line": "table = rotary_table(q.shape[2])", "also": ["q, k = (rotate(t, table) for t in (q, k))", "return torch.cat((a * cos - b * sin"]}


class UlyssesAttention(RotaryAttention):
    def __init__(self, sp, fixed):
        super().__init__()
        self.sp, self.fixed = sp, fixed

    def attend(self, q, k, v):
        if self.fixed:
            table = [part(t, self.sp) for t in rotary_table(q.shape[2] * self.sp.size())]
        else:
            table = rotary_table(q.shape[2])
        q, k = (rotate(t, table) for t in (q, k))
        q, k, v = (AllToAll.apply(t, self.sp, 1, 2) for t in (q, k, v))
        return AllToAll.apply(F.scaled_dot_product_attention(q, k, v, is_causal=True), self.sp, 2, 1)


def reference():
    return single(lambda: Net(attention=RotaryAttention))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, sp=3)
    dp, sp = mesh.get_group("dp"), mesh.get_group("sp")
    model = load(Net(attention=lambda: UlyssesAttention(sp, fixed)), ref.weights)
    tokens, labels = cp_shares(ref.batch, dp, sp)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
