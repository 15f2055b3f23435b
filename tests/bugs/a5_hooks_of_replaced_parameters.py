"""GPT-NeoX pull requests 1257 and 1259: hooks that sum the gradients of norms over the tensor-parallel ranks were registered before
deepspeed.initialize and never ran; the fix registers them after it. Here the engine puts other parameter objects into the model."""
import torch
import torch.distributed as dist
from kit import TP_SHARDS, SequenceNet, TpMlp, load, mesh_of, replicated, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "A5", "link": "https://github.com/EleutherAI/gpt-neox/pull/1257", "diagnosis": "partial sum",
       "line": "x = self.norm(self.hidden(", "also": ["self.mlp(self.norm2(x))", "sum_grads(model.parameters(), dp)", "rest = [p.grad"]}
reference = single


def sum_by_hooks(model, tp):
    """Each share is summed as soon as it is accumulated."""
    for p in replicated(model):
        if p is not model.head.weight:
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=tp))


def initialize(model):
    """The engine: parameters of its own, aligned in one flat buffer, in the place of the model's."""
    buffer = torch.cat([p.detach().flatten() for p in model.parameters()])
    at = 0
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(buffer[at:at + p.numel()].view_as(p)))
            at += p.numel()


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(SequenceNet(tp, mlp=lambda: TpMlp(tp, sequence=True)), ref.weights, tp, TP_SHARDS)
    if not fixed:
        sum_by_hooks(model, tp)
    initialize(model)
    if fixed:
        sum_by_hooks(model, tp)
    return tp_training(ref, model, dp, tp)
