"""What one small change mends is tried on the recorded calls, and told where all that it concerns is proved with it."""
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import trainverify as tv
from trainverify.report.json_ import decode, encode
from trainverify.report.model import Report
from trainverify.report.text import render

ROWS, WIDTH, CLASSES = 6, 3, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.first(x).tanh())


def verify(step: Callable, reference_step: Callable | None = None, ranks: int = 2, repair: bool = True) -> Report:
    """step(model, batch) makes gradients and returns the loss; then SGD."""
    def whole(model, batch):
        loss = F.cross_entropy(model(batch["x"]), batch["labels"], ignore_index=-100)
        loss.backward()
        return loss

    def training(model, batch, gradients):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def one():
            loss = gradients(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return tv.Training(model, one, batch=batch)

    def reference():
        torch.manual_seed(0)
        batch = {"x": torch.randn(ROWS, WIDTH), "labels": torch.tensor([0, -100, 2, 3, 1, 2])}
        return training(Net(), batch, reference_step or whole)

    def parallel(ref):
        dist.init_process_group("gloo")
        model = Net()
        model.load_state_dict(ref.weights)
        return training(model, ref.batch, step)

    return tv.verify(reference, parallel, ranks=ranks, timeout=60.0, repair=repair)


def repair(report: Report) -> str:
    """What is printed of the one finding's repair, with file names instead of paths."""
    assert report.verdict == "REFUTED" and len(report.findings) == 1, report.findings
    found = report.findings[0].repair
    return "" if found is None else str(found).replace(__file__, "here")


def line(function: Callable, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    (at,) = [first + i for i, one in enumerate(lines) if text in one]
    return at


def total(x, group=None):
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


def share(model, batch, ranks=2):
    """This rank's part of the loss of the whole batch."""
    x, labels = (batch[k].chunk(ranks)[dist.get_rank()] for k in ("x", "labels"))
    return F.cross_entropy(model(x), labels, ignore_index=-100, reduction="sum"), (labels != -100).sum()


def test_a_missing_reduction_of_gradients():
    def step(model, batch):
        loss, count = share(model, batch)
        loss = loss / total(count)
        loss.backward()
        for p in (*model.first.parameters(), model.head.weight):
            dist.all_reduce(p.grad)
        return total(loss)

    report = verify(step)
    told = repair(report)
    assert told.startswith("insert all_reduce(SUM) over all ranks before here:") and told.endswith(", of the gradient of head.bias: verified"), told
    assert report.findings[0].repair.proved == report.findings[0].repair.outputs == report.findings[0].explains
    assert "= repair:      insert all_reduce(SUM)" in render(report)
    assert decode(encode(report)).findings[0].repair == report.findings[0].repair


def test_no_repair_is_tried_where_none_is_wanted():
    def step(model, batch):
        loss, count = share(model, batch)
        (loss / total(count)).backward()
        return total(loss) / total(count)

    report = verify(step, repair=False)
    assert repair(report) == "" and not any(p.name == "repair" for p in report.phases)


@pytest.mark.slow
def test_a_reduction_that_averages_is_missing():
    def step(model, batch):
        loss, count = share(model, batch)
        loss = 2 * loss / total(count)
        loss.backward()
        return total(loss) / 2

    assert "insert all_reduce(AVG) over all ranks before" in (told := repair(verify(step))) and told.endswith("verified"), told


@pytest.mark.slow
def test_a_superfluous_reduction():
    def step(model, batch):
        loss, count = share(model, batch)
        loss = loss / total(count)
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        dist.all_reduce(model.head.bias.grad)
        return total(loss)

    assert repair(verify(step)) == f"remove the all_reduce at here:{line(step, 'head.bias.grad')}: verified"


@pytest.mark.slow
def test_a_sum_in_place_of_a_mean():
    def step(model, batch):
        loss, count = share(model, batch)
        loss = 2 * loss / total(count)
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return total(loss) / 2

    assert repair(verify(step)) == f"AVG instead of SUM in the all_reduce at here:{line(step, 'all_reduce(p.grad)')}: verified"


@pytest.mark.slow
def test_a_factor():
    def step(model, batch):
        loss, count = share(model, batch)
        loss = loss / total(count)
        (loss * 5).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return total(loss)

    told = repair(verify(step))
    assert told.startswith("scale by 1/5 at here:") and told.endswith(": verified"), told


@pytest.mark.slow
def test_a_reduction_over_the_wrong_group():
    def step(model, batch):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        x, labels = (batch[k].chunk(2)[mesh["dp"].get_local_rank()] for k in ("x", "labels"))
        loss = F.cross_entropy(model(x), labels, ignore_index=-100, reduction="sum")
        tokens = (labels != -100).sum()
        dist.all_reduce(tokens, group=mesh.get_group("tp"))
        (loss / tokens).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=mesh.get_group("dp"))
        return total(loss / tokens, mesh.get_group("dp"))

    assert repair(verify(step, ranks=4)) == f"all_reduce over dp instead of tp at here:{line(step, 'all_reduce(tokens')}: verified"


@pytest.mark.slow
def test_a_count_that_is_not_summed():
    def step(model, batch):
        loss, count = share(model, batch)
        loss = loss / count
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return total(loss)

    assert repair(verify(step)) == f"insert all_reduce(SUM) over all ranks after here:{line(share, '!= -100')}: verified"


def angles(x, positions):
    return x * (positions[:, None] * 0.5 + 1.0).cos()


def rotated(model, batch):
    loss = F.cross_entropy(model(angles(batch["x"], torch.arange(ROWS))), batch["labels"], ignore_index=-100)
    loss.backward()
    return loss


@pytest.mark.slow
def test_positions_that_begin_at_zero_on_every_rank():
    def step(model, batch):
        x, labels = (batch[k].chunk(2)[dist.get_rank()] for k in ("x", "labels"))
        loss = F.cross_entropy(model(angles(x, torch.arange(ROWS // 2))), labels, ignore_index=-100, reduction="sum") / total((labels != -100).sum())
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return total(loss)

    told = repair(verify(step, rotated))
    assert told == f"add 3 x this rank's place in all ranks to the positions made at here:{line(step, 'arange')}: verified", told


@pytest.mark.slow
def test_messages_that_go_the_wrong_way_round():
    def step(model, batch):
        rank = dist.get_rank()
        x = batch["x"].chunk(3)[(rank + 1) % 3]
        got = torch.empty_like(x)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x.contiguous(), (rank - 1) % 3), dist.P2POp(dist.irecv, got, (rank + 1) % 3)]):
            work.wait()
        labels = batch["labels"].chunk(3)[rank]
        loss = F.cross_entropy(model(got), labels, ignore_index=-100, reduction="sum") / total((labels != -100).sum())
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        return total(loss)

    told = repair(verify(step, ranks=3))
    assert told.startswith("send to the rank that is received from") and told.endswith(f"at here:{line(step, 'batch_isend_irecv')}: verified"), told


@pytest.mark.slow
def test_what_no_small_change_mends_has_no_repair():
    def step(model, batch):
        loss = F.cross_entropy(model(batch["x"]).sigmoid(), batch["labels"], ignore_index=-100)
        loss.backward()
        return loss

    assert repair(verify(step)) == ""


def test_a_loss_that_every_rank_reports_of_its_own_share_is_in_nobodys_way():
    """It differs from the second step on, with the repair too: no repair makes a rank's share the whole."""
    def step(model, batch):
        x, labels = (batch[k].chunk(2)[dist.get_rank()] for k in ("x", "labels"))
        loss = F.cross_entropy(model(x), labels.clamp(min=0))
        loss.backward()
        for p in (*model.first.parameters(), model.head.weight):
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        return loss

    def whole(model, batch):
        loss = F.cross_entropy(model(batch["x"]), batch["labels"].clamp(min=0))
        loss.backward()
        return loss

    report = verify(step, whole)
    told = repair(report)
    assert told.startswith("insert all_reduce(AVG) over all ranks before here:") and told.endswith(", of the gradient of head.bias: verified"), told
