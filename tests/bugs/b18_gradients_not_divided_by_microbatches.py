"""PyTorch pull request 144352: a pipeline schedule runs one backward per microbatch, of a loss that is a mean over the microbatch. The sum of
the gradients was not divided by the number of microbatches, which an adaptive optimizer hides; it is an option of the schedule since."""
import torch
from kit import Net, Stage, clip_stage, loss_of, make_batch, mesh_of, single, training
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

RANKS = 3
BUG = {"id": "B18", "link": "https://github.com/pytorch/pytorch/pull/144352", "diagnosis": "multiple",
       "line": "schedule.step(",
       "also": ["square = nn.utils.get_total_norm([p.grad for p in counted])", "return F.cross_entropy("]}
MICROBATCHES = 4


def mean_of_means(model, batch):
    parts = zip(batch["tokens"].chunk(MICROBATCHES), batch["labels"].chunk(MICROBATCHES))
    return sum(loss_of(model(tokens), labels) for tokens, labels in parts) / MICROBATCHES


def reference():
    return single(lambda: Net(layers=3), mean_of_means, make_batch(8, 6))


def parallel(ref, fixed=False):
    pp = mesh_of(pp=3).get_group("pp")
    stage = Stage(pp.rank(), pp.size(), layers=3).take(ref.weights)
    schedule = Schedule1F1B(PipelineStage(stage, pp.rank(), pp.size(), torch.device("cpu")), MICROBATCHES, loss_of, scale_grads=fixed)

    def backward():
        losses = []
        inputs = (ref.batch["tokens"],) if stage.first else ()
        schedule.step(*inputs, **({"target": ref.batch["labels"], "losses": losses} if stage.last else {}))
        return {"loss": sum(losses) / MICROBATCHES} if stage.last else {}

    return training(stage, backward, clip=lambda ps: clip_stage(ps, list(stage.parameters()), pp))
