"""DeepSpeed issue 5248: with Ulysses sequence parallelism gradients are summed over the data- and sequence-parallel ranks; the division by
their number was switched off by a hard-wired argument, and only that by the data-parallel ranks took place."""
import torch.distributed as dist
from kit import AllToAll, Attention, Net, cp_shares, load, loss_of, make_batch, mesh_of, single, total, training, valid

RANKS = 6
BUG = {"id": "B8", "link": "https://github.com/deepspeedai/DeepSpeed/issues/5248", "diagnosis": "multiple",
       "line": "p.grad /= dist.get_world_size(group) if divide else dp.size()",
       "also": ["dist.all_reduce(p.grad, group=group)", "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)"]}


class Ulysses(Attention):
    """The whole sequence of this rank's heads, between two exchanges."""

    def __init__(self, sp):
        super().__init__()
        self.sp = sp

    def attend(self, q, k, v):
        q, k, v = (AllToAll.apply(t, self.sp, 1, 2) for t in (q, k, v))
        return AllToAll.apply(super().attend(q, k, v), self.sp, 2, 1)


def reference():
    return single(lambda: Net(attention=Attention), batch=make_batch(8, 6))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, sp=3)
    dp, sp, everyone = mesh.get_group("dp"), mesh.get_group("sp"), mesh._flatten("dp_sp").get_group()
    model = load(Net(attention=lambda: Ulysses(sp)), ref.weights)
    tokens, labels = cp_shares(ref.batch, dp, sp)

    def reduce_grads(group, divide):
        for p in model.parameters():
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group) if divide else dp.size()

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), everyone)
        (loss * mesh.size()).backward()
        reduce_grads(everyone, divide=fixed)
        return total(loss, everyone)

    return training(model, backward)
