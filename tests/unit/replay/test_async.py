"""Pending collectives are completed at their waits: ranks may issue on several groups in different orders."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import trainverify as tv


def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def reference():
    m = model()
    x = torch.randn(4, 3)
    opt = torch.optim.SGD(m.parameters(), lr=0.1)

    def step():
        loss = m(x).pow(2).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return {"loss": loss}

    return tv.Training(m, step, batch={"x": x})


def parallel(ref):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    m = model()
    m.load_state_dict(ref.weights)
    x = ref.batch["x"].chunk(2)[rank]
    opt = torch.optim.SGD(m.parameters(), lr=0.1)

    def step():
        loss = m(x).pow(2).mean()
        loss.backward()
        pairs = list(zip((m.weight.grad, m.bias.grad), groups))
        works = [dist.all_reduce(g, op=dist.ReduceOp.AVG, group=group, async_op=True) for g, group in (pairs if rank == 0 else pairs[::-1])]
        for work in works:
            work.wait()
        opt.step()
        opt.zero_grad()
        return {"loss": tv.local(loss, reduce="mean")}

    return tv.Training(m, step)


def test_ranks_may_issue_in_different_orders():
    report = tv.verify(reference, parallel, ranks=2)
    assert report.outputs and all(o.verdict == "PROVED" or o.reason.startswith("equal at") for o in report.outputs), report
