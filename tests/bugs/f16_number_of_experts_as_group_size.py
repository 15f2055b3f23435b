"""DeepSpeed issue 7535 (PR 7551): the groups for expert parallelism were made with the number of experts where their size was meant. If
there are more experts than ranks no group is made, the layer finds None and talks to all ranks: every replica's expert answers
for the same tokens, and the answers are added up."""
import torch.distributed as dist
from kit import (EP_SHARDS, EXPERTS, Gather, Moe, Net, ReduceScatter, clip_sharded, load, loss_of, make_batch, rows_of, sharded, single, total,
                 training, valid)

RANKS = 4
EP_SIZE = 2
BUG = {"id": "F16", "link": "https://github.com/deepspeedai/DeepSpeed/issues/7535", "diagnosis": "multiple",
       "line": "return ReduceScatter.apply(y, self.group, 0)",
       "also": ["x, weights = (Gather.apply(", "return x + self.mlp(self.norm2(x))"]}


def create_ep_parallel_groups(size):
    """Consecutive ranks; this rank's group, or None if there is none."""
    mine = None
    for i in range(dist.get_world_size() // size):
        ranks = list(range(i * size, (i + 1) * size))
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    return mine


class EngineMoe(Moe):
    def __init__(self, group):
        super().__init__(EXPERTS // EP_SIZE)
        self.group = group

    def run(self, x, weights):
        x, weights = (Gather.apply(t, self.group, 0, True) for t in (x, weights))
        first = dist.get_rank() % EP_SIZE * len(self.w1)
        y = super().run(x, weights[..., first:first + len(self.w1)])
        return ReduceScatter.apply(y, self.group, 0)


def reference():
    return single(lambda: Net(Moe), batch=make_batch(rows=8))


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    ep = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // EP_SIZE]
    expert_dp = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][dist.get_rank() % EP_SIZE]
    group = create_ep_parallel_groups(EP_SIZE if fixed else EXPERTS)
    model = load(Net(lambda: EngineMoe(group)), ref.weights, ep, EP_SHARDS)
    experts = sharded(model, EP_SHARDS)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=expert_dp if any(p is e for e in experts) else None)
        return total(loss)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, experts, ep))
