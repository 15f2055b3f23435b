"""DeepSpeed PR 2058: ZeRO-2 with experts updates a partition of flat fp32 parameters per rank and copies it into its place among the
model's parameters. Dense parameters are partitioned over all ranks and experts over fewer, but one index, that of the
expert-data group, was used for both: most dense partitions were overwritten by another's update or never updated."""
import torch
import torch.distributed as dist
from kit import EP_SHARDS, EpMoe, Moe, Net, adamw, clip_sharded, load, loss_of, make_batch, mesh_of, rows_of, sharded, single, total, training, valid
from torch.nn.utils import parameters_to_vector

RANKS = 6
BUG = {"id": "D14", "link": "https://github.com/deepspeedai/DeepSpeed/pull/2058", "diagnosis": "never updated",
       "line": "bit16[partition].copy_(fp32)", "also": ["dist.all_gather(", "p.data.copy_("]}


def reference():
    return single(lambda: Net(Moe), batch=make_batch(rows=12, length=10))


class Partitioned:
    """One group of parameters, flattened and cut over the ranks of `group`; this rank updates its part."""

    def __init__(self, parameters, group):
        self.parameters, self.group = parameters, group
        self.fp32 = self.own(parameters).requires_grad_()

    def own(self, tensors):
        n = self.group.size()
        flat = torch.cat([t.detach().flatten() for t in tensors])
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % n)])
        return flat.chunk(n)[self.group.rank()].clone()


class Zero:
    def __init__(self, groups, expert_dp, fixed):
        self.groups, self.expert_dp, self.fixed = groups, expert_dp, fixed
        self.optimizer = adamw([g.fp32 for g in groups])

    def step(self):
        for g in self.groups:
            g.fp32.grad = g.own([p.grad for p in g.parameters])
        self.optimizer.step()
        for g in self.groups:
            partition = g.group.rank() if self.fixed else self.expert_dp.rank()
            self.write_back(g, partition, g.fp32.detach())

    def write_back(self, g, partition, fp32):
        flat = parameters_to_vector(g.parameters).detach()
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % g.group.size())])
        bit16 = list(flat.chunk(g.group.size()))
        bit16[partition].copy_(fp32)
        dist.all_gather(bit16, bit16[g.group.rank()].clone(), group=g.group)
        at = 0
        for p in g.parameters:
            p.data.copy_(flat[at:at + p.numel()].view_as(p))
            at += p.numel()

    def zero_grad(self):
        for g in self.groups:
            for p in g.parameters:
                p.grad = None


def parallel(ref, fixed=False):
    mesh = mesh_of(expert_dp=3, ep=2)
    expert_dp, ep = mesh.get_group("expert_dp"), mesh.get_group("ep")
    model = load(Net(lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    experts = sharded(model, EP_SHARDS)
    dense = [p for p in model.parameters() if not any(p is e for e in experts)]
    optimizer = Zero([Partitioned(dense, dist.group.WORLD), Partitioned(experts, expert_dp)], expert_dp, fixed)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=expert_dp if any(p is e for e in experts) else None)
        return total(loss)

    return training(model, backward, optimizer, lambda ps: clip_sharded(ps, experts, ep))
