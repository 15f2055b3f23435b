"""safe-rlhf issue 153, PR 154: the clipped policy loss was summed over a rank's tokens and divided by its own mask.sum(), then
averaged over the ranks. Ranks with short answers weigh their tokens more. The fix averages per answer first: every rank has the
same number of answers."""
import torch
import torch.distributed as dist
from kit import IGNORE, Net, load, make_batch, mean_grads, single, total, training

RANKS = 3
BUG = {"id": "C7", "link": "https://github.com/PKU-Alignment/safe-rlhf/issues/153", "diagnosis": "reweighted",
       "missed": ["diagnosis"], "line": "return torch.sum(losses * mask) / mask.sum()", "also": ["loss.backward()"]}
CLIP = 0.2


def actor_loss(model, batch, per_answer=True):
    labels = batch["labels"]
    mask = labels != IGNORE
    log_probs = model(batch["tokens"]).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ratio = (log_probs - batch["old_log_probs"]).exp()
    losses = torch.maximum(-batch["advantages"] * ratio, -batch["advantages"] * ratio.clamp(1 - CLIP, 1 + CLIP))
    if per_answer:
        return torch.mean(torch.sum(losses * mask, dim=-1) / mask.sum(dim=-1))
    return torch.sum(losses * mask) / mask.sum()


def reference():
    torch.manual_seed(1)
    batch = make_batch()
    batch |= {"advantages": torch.randn(batch["labels"].shape), "old_log_probs": -3 + 0.3 * torch.randn(batch["labels"].shape)}
    return single(loss=actor_loss, batch=batch)


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    batch = {k: v.chunk(RANKS)[dist.get_rank()] for k, v in ref.batch.items()}

    def backward():
        loss = actor_loss(model, batch, per_answer=fixed)
        loss.backward()
        mean_grads(model.parameters(), None)
        return total(loss) / RANKS

    return training(model, backward)
