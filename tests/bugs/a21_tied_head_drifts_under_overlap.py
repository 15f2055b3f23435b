"""Megatron-LM issue 656: the first stage of a pipeline holds the embedding, the last one a copy of it as output layer. With overlapped
reduction of gradients the gradients of the two copies were not summed, and the copies drifted apart."""
import torch.distributed as dist
from kit import Net, Stage, clip_stage, gpipe, loss_of, make_batch, mesh_of, rows_of, single, total, training, valid

RANKS = 6
BUG = {"id": "A21", "link": "https://github.com/NVIDIA/Megatron-LM/issues/656", "diagnosis": "partial sum",
       "line": "works.append(dist.all_reduce(p.grad, group=dp, async_op=True))", "also": ["work.wait()", "nn.utils.get_total_norm([p.grad for p in counted])",
                                                                                    "x = self.embed(x)", "return self.head(self.norm(x))"]}
MICROBATCHES = 3


def reference():
    return single(lambda: Net(tied=True, layers=3), batch=make_batch(12, 10))


def overlap(stage, dp):
    """Hooks that start the sum over dp as soon as a gradient has its last microbatch; returns what waits for them."""
    seen, works = {}, []

    def ready(p):
        seen[p] = seen.get(p, 0) + 1
        if seen[p] % MICROBATCHES == 0:
            works.append(dist.all_reduce(p.grad, group=dp, async_op=True))

    def finish():
        while works:
            work = works.pop(0)
            work.wait()

    for p in stage.parameters():
        p.register_post_accumulate_grad_hook(ready)
    return finish


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, pp=3)
    dp, pp = mesh.get_group("dp"), mesh.get_group("pp")
    stage = Stage(pp.rank(), pp.size(), layers=3).take(ref.weights)
    tied = stage.embed.weight if stage.first else stage.head.weight if stage.last else None
    copies = dist.new_subgroups_by_enumeration([[0, 2], [3, 5]])[0]
    finish_overlap = overlap(stage, dp)
    tokens, labels = rows_of(ref.batch, dp)
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def backward():
        tokens = total(valid(labels), dp)
        losses = gpipe(stage, microbatches, lambda logits, labels: loss_of(logits, labels, "sum") / tokens)
        finish_overlap()
        if fixed and tied is not None:
            dist.all_reduce(tied.grad, group=copies)
        return {"loss": total(sum(losses), dp)} if stage.last else {}

    counted = [p for p in stage.parameters() if stage.first or p is not tied]
    return training(stage, backward, clip=lambda ps: clip_stage(ps, counted, pp))
