"""DDP's reductions end with the backward: what reads a bucket before that reads what happens to be there."""
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import trainverify as tv
from judge import assert_equal, assert_not_equal, line_of, messages, summary

RANKS = 2


class Two(nn.Module):
    """The second layer's gradients are there, and their bucket is on its way, before the first one's."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def training(model, inner, x, after):
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)

    def step():
        model(x).square().mean().backward()
        after(inner)
        optimizer.step()
        optimizer.zero_grad()
    return tv.Training(inner, step, batch=x)


def verify(prepare=lambda model, inner: None, after=lambda inner: None, steps=2, **options):
    """prepare(model, inner) may add hooks; after(inner) runs between backward and optimizer; with
    find_unused_parameters the first step's buckets hold one parameter each, as those of the second do."""
    def reference():
        torch.manual_seed(0)
        model = Two()
        return training(model, model, torch.randn(6, 4), lambda inner: None)

    def parallel(ref):
        dist.init_process_group("gloo")
        inner = Two()
        inner.load_state_dict(ref.weights)
        model = DDP(inner, bucket_cap_mb=1e-6, gradient_as_bucket_view=True, **options)
        prepare(model, inner)
        return training(model, inner, ref.batch.chunk(RANKS)[dist.get_rank()], after)

    return tv.verify(reference, parallel, ranks=RANKS, steps=steps, timeout=60.0)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_gradients_after_the_backward(options):
    assert_equal(verify(**options))


def test_a_gradient_that_is_read_while_its_bucket_is_reduced():
    early = {}

    def prepare(model, inner):
        def hook(grad):
            early["grad"] = inner.second.weight.grad.clone()
        inner.first.weight.register_hook(hook)

    def after(inner):
        inner.second.weight.grad.copy_(early["grad"])

    report = verify(prepare, after, steps=1, find_unused_parameters=True)
    assert_not_equal(report, "second.weight")
    assert line_of(prepare, "clone()") in {d.span.line for d in messages(report) if d.code == "REL007"}, summary(report)


def test_a_gradient_that_is_changed_while_its_bucket_is_reduced():
    def prepare(model, inner):
        def hook(grad):
            inner.second.weight.grad.mul_(1.0)
        inner.first.weight.register_hook(hook)

    report = verify(prepare, steps=1, find_unused_parameters=True)
    assert_not_equal(report)
    assert line_of(prepare, "mul_") in {d.span.line for d in messages(report) if d.code == "REL007"}, summary(report)


# -- communication hooks

def then_divided(group, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / RANKS)


def waited(group, bucket):
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future().wait()[0]
    future = torch.futures.Future()
    future.set_result(reduced / RANKS)
    return future


def waited_behind(group, bucket):
    follows = dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / RANKS).then(lambda done: done.value() * 1)
    future = torch.futures.Future()
    future.set_result(follows.wait())
    return future


def reduced_again(group, bucket):
    """As PowerSGD: a second reduction when the first one is there."""
    def again(done):
        half = done.value()[0] / 2
        dist.all_reduce(half, async_op=True).get_future().wait()
        return half / RANKS
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(again)


def too_early(group, bucket):
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    early = bucket.buffer() / RANKS
    return future.then(lambda done: early)


@pytest.mark.parametrize("hook", [then_divided, waited, waited_behind, reduced_again])
def test_hooks_that_wait(hook):
    assert_equal(verify(lambda model, inner: model.register_comm_hook(None, hook), steps=1))


def test_a_hook_that_does_not_wait():
    report = verify(lambda model, inner: model.register_comm_hook(None, too_early), steps=1)
    assert_not_equal(report)
    assert line_of(too_early, "early = ") in {d.span.line for d in messages(report) if d.code == "REL007"}, summary(report)


def test_torch_s_own_hook():
    assert_equal(verify(lambda model, inner: model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE), steps=1))


def test_an_error_in_what_follows_is_the_program_s():
    def wrong(group, bucket):
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[7])
    report = verify(lambda model, inner: model.register_comm_hook(None, wrong), steps=1)
    assert report.verdict == "ERROR" and "list index out of range" in summary(report), summary(report)
