"""DeepSpeed PR 545: ZeRO-2 adds the gradients of a microbatch to the accumulated ones pairwise, from two lists. A parameter that took no
part in a microbatch had no entry in its list, so the rest moved up and was added to other parameters' gradients. The fix
enters zeros."""
import torch
import torch.distributed as dist
from kit import HIDDEN, Net, load, loss_of, make_batch, part, single, total, training, valid
from torch import nn

RANKS = 2
MICROBATCHES = 3
BUG = {"id": "G8", "link": "https://github.com/deepspeedai/DeepSpeed/pull/545", "diagnosis": "additive term",
       "line": "accumulated.add_(new)", "also": ["p.grad = accumulated"]}


class Adapters(nn.Module):
    """One matrix per language; a row goes through its language's."""

    languages = None

    def __init__(self):
        super().__init__()
        self.adapters = nn.ParameterList(torch.eye(HIDDEN) for _ in range(4))

    def forward(self, x):
        return torch.stack([row @ self.adapters[language] for row, language in zip(x, self.languages.tolist())])


def run(model, tokens, labels, languages, reduction="mean"):
    Adapters.languages = languages
    return loss_of(model(tokens), labels, reduction)


def reference():
    batch = make_batch(rows=12, length=10) | {"languages": torch.tensor([0, 1, 1, 2, 3, 0, 2, 3, 2, 0, 0, 1])}
    return single(lambda: Net(Adapters), lambda model, b: run(model, b["tokens"], b["labels"], b["languages"]), batch)


def reduced_grads(parameters, fixed):
    """This microbatch's gradients, summed over the ranks; what a rank lacks counts as zeros if some other rank has it."""
    grads = []
    for p in parameters:
        anywhere = total(torch.tensor(int(p.grad is not None))) > 0
        if fixed or anywhere:
            grads.append(total(torch.zeros_like(p) if p.grad is None else p.grad))
        p.grad = None
    return grads


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = load(Net(Adapters), ref.weights)
    adapters = list(model.layers[0].mlp.parameters())
    parameters = [p for p in model.parameters() if not any(p is a for a in adapters)] + adapters
    microbatches = list(zip(*(part(ref.batch[k], None).chunk(MICROBATCHES) for k in ("tokens", "labels", "languages"))))

    def backward():
        num_tokens, losses = total(sum(valid(labels) for _, labels, _ in microbatches)), 0.0
        averaged_gradients = None
        for microbatch in microbatches:
            loss = run(model, *microbatch, "sum") / num_tokens
            loss.backward()
            losses = losses + loss.detach()
            grads = reduced_grads(parameters, fixed)
            if averaged_gradients is None:
                averaged_gradients = grads
                continue
            for accumulated, new in zip(averaged_gradients, grads):
                accumulated.add_(new)
        for p, accumulated in zip(parameters, averaged_gradients):
            p.grad = accumulated
        return total(losses)

    return training(model, backward)
