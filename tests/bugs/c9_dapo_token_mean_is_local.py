"""verl PR 5366 (also TRL PR 3938): the "token-mean" of DAPO divided by the tokens of one rank's micro-batch and weighed the result by
the number of its answers. The objective so depended on how the mini-batch was cut. The fix passes the token count of the whole
mini-batch over all ranks, and the number of ranks."""
import torch
import torch.distributed as dist
from kit import IGNORE, Net, load, make_batch, mean_grads, single, total, training

RANKS = 2
SPLIT = [1, 3, 2]                          # rows of a rank's micro-batches, packed by length
BUG = {"id": "C9", "link": "https://github.com/verl-project/verl/pull/5366", "diagnosis": "reweighted",
       "line": "return (loss_mat * mask).sum() / tokens * dp_size", "also": ["policy_loss = policy_loss * scale"]}


def log_prob(model, batch):
    labels = batch["labels"]
    return model(batch["tokens"]).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def agg_loss(loss_mat, mask, tokens=None, dp_size=1):
    """The mean over tokens: of this micro-batch, unless the number of tokens is given."""
    tokens = mask.sum() if tokens is None else tokens
    return (loss_mat * mask).sum() / tokens * dp_size


def policy_gradient(model, batch):
    return -batch["advantages"] * (log_prob(model, batch) - batch["old_log_probs"]).exp()


def reference():
    torch.manual_seed(1)
    batch = make_batch(rows=12, length=10)
    batch |= {"advantages": torch.randn(batch["labels"].shape), "old_log_probs": -3 + 0.3 * torch.randn(batch["labels"].shape)}
    return single(loss=lambda model, batch: agg_loss(policy_gradient(model, batch), batch["labels"] != IGNORE), batch=batch)


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    mini_batch = {k: v.chunk(RANKS)[dist.get_rank()] for k, v in ref.batch.items()}
    micro_batches = [dict(zip(mini_batch, rows)) for rows in zip(*(v.split(SPLIT) for v in mini_batch.values()))]

    def backward():
        batch_num_tokens, reported = total((mini_batch["labels"] != IGNORE).sum()), 0.0
        for micro_batch in micro_batches:
            loss_mat, mask = policy_gradient(model, micro_batch), micro_batch["labels"] != IGNORE
            if fixed:
                policy_loss = agg_loss(loss_mat, mask, batch_num_tokens, RANKS)
            else:
                scale = len(mask) / sum(SPLIT)
                policy_loss = agg_loss(loss_mat, mask)
                policy_loss = policy_loss * scale
            policy_loss.backward()
            reported = reported + policy_loss.detach()
        mean_grads(model.parameters(), None)
        return total(reported) / RANKS

    return training(model, backward)
