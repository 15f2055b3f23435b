"""Megatron-LM issue 906: gradients are summed over the data- and context-parallel ranks, and the buffer that holds them scales them by
one over the data-parallel ranks alone, while the loss counts once per context-parallel rank."""
import torch
import torch.distributed as dist
from kit import Attention, ContextAttention, Net, cp_shares, load, loss_of, make_batch, mesh_of, single, total, training, valid

RANKS = 6
BUG = {"id": "B2", "link": "https://github.com/NVIDIA/Megatron-LM/issues/906", "diagnosis": "multiple",
       "line": "self.data.mul_(self.scaling)",
       "also": ["dist.all_reduce(self.data, group=self.group)", "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)"]}


def reference():
    return single(lambda: Net(attention=Attention), batch=make_batch(8, 6))


class GradBuffer:
    """All gradients in one flat buffer, scaled before they are summed."""

    def __init__(self, parameters, group, scaling):
        self.group, self.scaling = group, scaling
        self.data = torch.zeros(sum(p.numel() for p in parameters))
        at = 0
        for p in parameters:
            p.grad = self.data[at:at + p.numel()].view_as(p)
            at += p.numel()

    def finish_grad_sync(self):
        self.data.mul_(self.scaling)
        dist.all_reduce(self.data, group=self.group)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp, group = mesh.get_group("dp"), mesh.get_group("cp"), mesh._flatten("dp_cp").get_group()
    model = load(Net(attention=lambda: ContextAttention(cp)), ref.weights)
    inputs, labels = cp_shares(ref.batch, dp, cp)

    def backward():
        buffer = GradBuffer(list(model.parameters()), group, 1 / (group.size() if fixed else dp.size()))
        loss = loss_of(model(inputs), labels, "sum") / total(valid(labels), group)
        (loss * group.size()).backward()
        buffer.finish_grad_sync()
        return total(loss, group)

    return training(model, backward)
