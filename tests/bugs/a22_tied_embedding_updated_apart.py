"""Piper issue 13: a tied embedding is on the first and on the last stage of a pipeline. Each stage's optimizer updates its copy by the
gradient of its own use, so that after one step the two differ."""
import torch.distributed as dist
from kit import Net, Stage, clip_stage, gpipe, loss_of, make_batch, mesh_of, single, training, valid

RANKS = 3
BUG = {"id": "A22", "link": "https://github.com/uw-syfi/piper/issues/13", "diagnosis": "partial sum",
       "line": "y.backward(grad)", "also": ["optimizer.step()", "nn.utils.get_total_norm([p.grad for p in counted])", "x = self.embed(x)",
                                            "return self.head(self.norm(x))"]}
MICROBATCHES = 2


def reference():
    return single(lambda: Net(tied=True, layers=3), batch=make_batch(8))


def parallel(ref, fixed=False):
    pp = mesh_of(pp=3).get_group("pp")
    stage = Stage(pp.rank(), pp.size(), layers=3).take(ref.weights)
    copies = dist.new_group([0, pp.size() - 1])
    tied = stage.embed.weight if stage.first else stage.head.weight if stage.last else None
    tokens, labels = ref.batch["tokens"], ref.batch["labels"]
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def backward():
        losses = gpipe(stage, microbatches, lambda logits, mine: loss_of(logits, mine, "sum") / valid(labels))
        if fixed and tied is not None:
            dist.all_reduce(tied.grad, group=copies)
        return {"loss": sum(losses)} if stage.last else {}

    counted = [p for p in stage.parameters() if stage.first or p is not tied]
    return training(stage, backward, clip=lambda ps: clip_stage(ps, counted, pp))
