"""torchtitan PR 4174: tokens whose log-probability from the generator is not finite were dropped from the policy loss but were still
counted among the tokens that it is divided by. The fix counts after the filter; the counts of all ranks are summed."""
import torch
import torch.distributed as dist
from kit import IGNORE, Net, load, make_batch, rows_of, single, sum_grads, total, training

import trainverify as tv

RANKS = 3
BUG = {"id": "C10", "link": "https://github.com/pytorch/torchtitan/pull/4174", "diagnosis": "multiple",
       "line": "num_valid_tokens = total(mask.sum())", "also": ["loss = (token_loss * usable).sum() / num_valid_tokens"]}


def reinforce(model, tokens, labels, generator_logprobs):
    """The loss of every token, and which tokens count: those of an answer for which the generator gave a finite number."""
    logprobs = model(tokens).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    mask = labels != IGNORE
    usable = mask & torch.isfinite(generator_logprobs)
    ratio = (logprobs - generator_logprobs.where(usable, 0.0)).exp()
    return -ratio, mask, usable


def reference():
    batch = make_batch()
    logprobs = -2 - (torch.arange(batch["labels"].numel()).view_as(batch["labels"]) % 7) / 4
    logprobs[0, 6:], logprobs[3, 7] = -torch.inf, torch.nan
    batch["generator_logprobs"] = tv.fixed(logprobs)

    def loss(model, batch):
        token_loss, _, usable = reinforce(model, batch["tokens"], batch["labels"], batch["generator_logprobs"])
        return (token_loss * usable).sum() / usable.sum()

    return single(loss=loss, batch=batch)


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(), ref.weights)
    tokens, labels = rows_of(ref.batch, None)
    generator_logprobs = ref.batch["generator_logprobs"].chunk(RANKS)[dist.get_rank()]

    def backward():
        token_loss, mask, usable = reinforce(model, tokens, labels, generator_logprobs)
        if fixed:
            num_valid_tokens = total(usable.sum())
        else:
            num_valid_tokens = total(mask.sum())
        loss = (token_loss * usable).sum() / num_valid_tokens
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
