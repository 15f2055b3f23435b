"""SyncBatchNorm on CPU tensors: torch's five functions against batch norm of all ranks' rows, and whole runs."""
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import trainverify as tv
from trainverify.capture import sync_batch_norm as functions

EPS, MOMENTUM = 1e-3, 0.3


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2), (5, 3, 2, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_ranks_with_unequal_rows_are_one_batch(shape, affine):
    """Forward, running statistics and all gradients, as torch.nn._functions puts the five functions together."""
    x, g = rnd(*shape).requires_grad_(), rnd(*shape, seed=1)
    w, b = (rnd(3, seed=s).requires_grad_() if affine else None for s in (2, 3))
    whole = [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    want = F.batch_norm(x, *whole, w, b, True, MOMENTUM, EPS)
    wanted = torch.autograd.grad(want, [x, w, b] if affine else [x], g)

    rows, running = [2, 3], [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    xs, gs = x.detach().split(rows), g.split(rows)
    with torch.no_grad():
        stats = [functions.batch_norm_stats(part, EPS) for part in xs]
        counts = torch.tensor([part.numel() / 3 for part in xs], dtype=torch.float64)
        mean, invstd = functions.batch_norm_gather_stats_with_counts(xs[0], *(torch.stack(s) for s in zip(*stats)), *running, MOMENTUM, EPS, counts)
        got = torch.cat([functions.batch_norm_elemt(part, w, b, mean, invstd, EPS) for part in xs])
        reduced = [functions.batch_norm_backward_reduce(gp, part, mean, invstd, w, True, affine, affine) for gp, part in zip(gs, xs)]
        sums = [sum(r[k] for r in reduced) for k in (0, 1)]
        of_x = torch.cat([functions.batch_norm_backward_elemt(gp, part, mean, invstd, w, *sums, counts.int()) for gp, part in zip(gs, xs)])
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(running, whole)
    grads = [of_x] + ([sum(r[k] for r in reduced) for k in (2, 3)] if affine else [])
    torch.testing.assert_close(grads, list(wanted))


def test_only_the_gradients_that_are_asked_for():
    x, mean, invstd = rnd(4, 3), rnd(3, seed=1), rnd(3, seed=2).exp()
    got = functions.batch_norm_backward_reduce(x, x, mean, invstd, None, False, True, True)
    assert [v is not None for v in got] == [False, False, False, True]
    got = functions.batch_norm_backward_reduce(x, x, mean, invstd, mean, True, False, False)
    assert [v is not None for v in got] == [True, True, False, False]


def test_half_precision_adds_up_in_float32():
    x = rnd(4, 3).to(torch.bfloat16)
    mean, var = functions.batch_norm_stats(x, EPS)
    assert mean.dtype == var.dtype == torch.float32
    assert functions.batch_norm_elemt(x, None, None, mean, var, EPS).dtype == torch.bfloat16


def test_torch_is_left_as_it_was():
    before = torch.nn.SyncBatchNorm.forward, torch.nn.modules._functions.torch, torch._C._get_privateuse1_backend_name
    with functions.sync_batch_norm(lambda code, text: None):
        assert torch.nn.SyncBatchNorm.forward is not before[0]
    assert before == (torch.nn.SyncBatchNorm.forward, torch.nn.modules._functions.torch, torch._C._get_privateuse1_backend_name)


# ---- whole runs
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 3, 2, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean(-1))


def training(model, module, batch, share):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
        return {"loss": share(loss)}
    return tv.Training(module, step, batch=batch)


def reference():
    torch.manual_seed(0)
    net = Net()
    return training(net, net, {"x": torch.randn(4, 2, 3), "y": torch.tensor([0, 3, 1, 2])}, lambda loss: loss)


def parallel(ref, synchronised):
    dist.init_process_group("nccl")
    net = Net()
    net.load_state_dict(ref.weights)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if synchronised else net
    mine = {k: v.chunk(2)[dist.get_rank()] for k, v in ref.batch.items()}
    return training(DistributedDataParallel(net), net, mine, tv.local)


@pytest.mark.slow
def test_synchronised_statistics_are_those_of_the_whole_batch():
    report = tv.verify(reference, parallel, ranks=2, case={"synchronised": True})
    assert report.verdict == "PROVED", ([(o.kind, o.name, o.reason) for o in report.outputs if o.verdict != "PROVED"], report.diagnostics)
    (assumed,) = [a for a in report.assumptions if "SyncBatchNorm" in a.text]
    assert __file__ in assumed.places[0]


@pytest.mark.slow
def test_statistics_of_each_rank_are_not():
    report = tv.verify(reference, parallel, ranks=2, case={"synchronised": False})
    assert report.verdict == "REFUTED", report.outputs
    (finding,) = report.findings
    lines, first = inspect.getsourcelines(Net.forward)
    assert "self.norm(" in lines[finding.diagnostic.span.line - first], finding
