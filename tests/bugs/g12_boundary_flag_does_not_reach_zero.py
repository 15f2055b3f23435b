"""DeepSpeed PR 1263 and 1264: the pipeline engine knows which microbatch is the last one, but did not tell the ZeRO optimizer, whose flag
kept its first value. Every microbatch's backward looked like the last: the gradients were reduced and taken over each time, in
place of what had been accumulated."""
import torch.distributed as dist
from kit import Net, Stage, clip_stage, gpipe, loss_of, make_batch, mesh_of, rows_of, single, total, training, valid

RANKS = 4
MICROBATCHES = 3
BUG = {"id": "G12", "link": "https://github.com/deepspeedai/DeepSpeed/pull/1263", "diagnosis": "additive term",
       "line": "self.averaged[p] = p.grad", "also": ["dist.all_reduce(p.grad, group=self.dp)", "p.grad = self.averaged[p]"]}


def reference():
    return single(lambda: Net(layers=2), batch=make_batch(rows=12, length=10))


class ZeroOptimizer:
    """Accumulates in p.grad until the boundary, then reduces over the replicas of this stage."""

    def __init__(self, parameters, dp):
        self.parameters, self.dp, self.is_boundary, self.averaged = parameters, dp, True, {}
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.after)

    def after(self, p):
        if self.is_boundary:
            dist.all_reduce(p.grad, group=self.dp)
            self.averaged[p] = p.grad
            p.grad = None

    def hand_over(self):
        for p in self.parameters:
            p.grad = self.averaged[p]


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, pp=2)
    dp, pp = mesh.get_group("dp"), mesh.get_group("pp")
    stage = Stage(pp.rank(), 2, 2).take(ref.weights)
    parameters = list(stage.parameters())
    zero = ZeroOptimizer(parameters, dp)
    tokens, labels = rows_of(ref.batch, dp)
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def run(microbatch, num_tokens, last):
        if fixed:
            zero.is_boundary = last
        return gpipe(stage, [microbatch], lambda y, t: loss_of(y, t, "sum") / num_tokens)

    def backward():
        num_tokens, losses = total(valid(labels), dp), []
        for i, microbatch in enumerate(microbatches):
            losses += run(microbatch, num_tokens, i == MICROBATCHES - 1)
        zero.hand_over()
        return {"loss": total(sum(losses), dp)} if stage.last else {}

    return training(stage, backward, clip=lambda ps: clip_stage(ps, ps, pp))
