"""Each class of difference, planted in a tiny program, is named as such, with the words that an engineer needs and the line to look at."""
import inspect
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

import trainverify as tv
from trainverify.diagnose.words import Names
from trainverify.report.model import Finding, Report

ROWS, WIDTH, CLASSES = 6, 4, 5
LR = 0.1


class Net(nn.Module):
    """Two layers of one shape, and a head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


def losses(model, x, labels, reduction="mean"):
    return F.cross_entropy(model(x), labels, ignore_index=-100, reduction=reduction)


def batch():
    return {"x": torch.randn(ROWS, WIDTH), "labels": torch.tensor([0, -100, 2, 3, 4, 1])}


def plain(model, data, optimizer):
    """One step of the reference."""
    losses(model, data["x"], data["labels"]).backward()
    optimizer.step()
    optimizer.zero_grad()


def verify(step: Callable, reference_step: Callable = plain, ranks: int = 1, steps: int = 1, momentum: float = 0.0, repair: bool = True) -> Report:
    """step(model, batch, optimizer) against reference_step, on every rank with the reference's weights."""
    def training(model, data, one_step):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
        return tv.Training(model, lambda: one_step(model, data, optimizer), batch=data)

    def reference():
        torch.manual_seed(0)
        return training(Net(), batch(), reference_step)

    def parallel(ref):
        if ranks > 1:
            dist.init_process_group("gloo")
        model = Net()
        model.load_state_dict(ref.weights)
        return training(model, ref.batch, step)

    return tv.verify(reference, parallel, ranks=ranks, steps=steps, timeout=60.0, repair=repair)


def finding(report: Report, diagnosis: str, *words: str) -> Finding:
    """The first finding, which must be of this class and say these words."""
    assert report.verdict == "REFUTED" and report.findings
    f = report.findings[0]
    text = "; ".join((f.diagnostic.message, f.algebra))
    assert f.diagnosis == diagnosis, (f.diagnosis, text)
    for w in words:
        assert w in text, (w, text)
    return f


def names(f: Finding, function: Callable, text: str) -> None:
    """The finding's first place is the one line of the function that contains the text."""
    lines, first = inspect.getsourcelines(function)
    assert [first + i for i, line in enumerate(lines) if text in line] == [f.diagnostic.span.line], f.diagnostic.span


def mine(data, ranks):
    return (data[k].chunk(ranks)[dist.get_rank()] for k in ("x", "labels"))


# ---- multiples

def test_a_multiple_is_named_after_the_mesh_axis_that_it_equals():
    def twice(model, data, optimizer):
        mesh = model.mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
        x, labels = (data[k].chunk(3)[mesh.get_local_rank("dp")] for k in ("x", "labels"))
        (losses(model, x, labels, "sum") / 5).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=mesh.get_group("dp"))
            dist.all_reduce(p.grad, group=mesh.get_group("dp"))
        optimizer.step()
    finding(verify(twice, ranks=6), "multiple", "gradient is 3 x the reference (3 = dp)")


def test_a_multiple_is_named_after_the_microbatches():
    def summed(model, data, optimizer):
        for x, labels in zip(data["x"].split(2), data["labels"].split(2)):
            losses(model, x, labels).backward()
        optimizer.step()

    def each(model, data, optimizer):
        loss = sum(losses(model, x, labels) for x, labels in zip(data["x"].split(2), data["labels"].split(2))) / 3
        loss.backward()
        optimizer.step()
    finding(verify(summed, each), "multiple", "3 x the reference (3 = the number of microbatches)")


def test_a_multiple_before_clipping():
    def clipped(factor):
        def step(model, data, optimizer):
            (losses(model, data["x"], data["labels"]) * factor).backward()
            clip_grad_norm_([model.a.weight], 1e-3)
            clip_grad_norm_(model.parameters(), 1e-4)
            optimizer.step()
        return step

    def doubled(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.b.weight.grad.mul_(2.0)
        clip_grad_norm_([model.a.weight], 1e-3)
        clip_grad_norm_(model.parameters(), 1e-4)
        optimizer.step()
    f = finding(verify(doubled, clipped(1.0)), "multiple", "gradient is 2 x the reference")
    names(f, doubled, "mul_(2.0)")


def test_a_gradient_that_never_arrives():
    def detached(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.b.weight.grad.zero_()
        optimizer.step()
    finding(verify(detached), "multiple", "gradient is zero where the reference's is not")


# ---- shares

def test_a_partial_sum_over_a_named_axis():
    def unreduced(model, data, optimizer):
        mesh = model.mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        x, labels = (data[k].chunk(2)[mesh.get_local_rank("tp")] for k in ("x", "labels"))
        (losses(model, x, labels, "sum") / 5).backward()
        norm = sum(p.grad.square().sum() for p in model.parameters())
        optimizer.step()
        return {"norm": norm}
    f = finding(verify(unreduced, ranks=2), "partial sum", "gradient is one rank's share: the sum over tp ranks [0, 1] is missing")
    lines, first = inspect.getsourcelines(unreduced)
    assert first + next(i for i, line in enumerate(lines) if "square()" in line) in {s.line for s in f.used_at}


def test_a_partial_sum_before_clipping():
    def step(reduced):
        def step(model, data, optimizer):
            x, labels = mine(data, 2)
            (losses(model, x, labels, "sum") / 5).backward()
            for p in reduced(model):
                dist.all_reduce(p.grad)
            clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        return step

    def clipped(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    report = verify(step(lambda model: [model.a.weight, model.head.weight]), clipped, ranks=2)
    finding(report, "partial sum", "the sum over ranks [0, 1] is missing", "reference = sum over ranks [0, 1] of the parallel values")
    assert len(report.findings) == 1


# ---- weights

def test_microbatches_that_weigh_the_same():
    def means(model, data, optimizer):
        for x, labels in zip(data["x"].split([4, 2]), data["labels"].split([4, 2])):
            (losses(model, x, labels) / 2).backward()
        optimizer.step()
    finding(verify(means), "reweighted", "microbatches", "1 : 1; in the reference 3 : 2")


def test_ranks_that_weigh_the_same():
    def means(model, data, optimizer):
        x, labels = mine(data, 2)
        loss = losses(model, x, labels)
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        optimizer.step()
        loss = loss.detach() / 2
        dist.all_reduce(loss)
        return {"loss": loss}

    def reported(model, data, optimizer):
        loss = losses(model, data["x"], data["labels"])
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    report = verify(means, reported, ranks=2)
    finding(report, "reweighted", "the shares of ranks [0, 1] count 1 : 1; in the reference 2 : 3")
    assert len(report.findings) == 1          # the loss is wrong by the same weights


# ---- terms

def test_a_missing_term_of_the_reference():
    def with_penalty(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.b.weight.square().sum().backward()
        optimizer.step()
    finding(verify(plain, with_penalty), "additive term", "a term is missing", "2 x b.weight before the first step")


def test_a_missing_value_of_the_reference():
    def auxiliary(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.a(data["x"]).pow(4).mean().backward()
        optimizer.step()
    finding(verify(plain, auxiliary), "additive term", "a term is missing: the reference's mm at test_classes.py")


def test_gradients_that_are_not_zeroed():
    def kept(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        optimizer.step()
    finding(verify(kept, steps=2), "additive term", "a term too many: share 1, made in step 1 at")


def test_weight_decay_that_the_reference_lacks():
    def decayed(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        with torch.no_grad():
            model.a.weight.mul_(1 - LR / 100)
        optimizer.step()
        optimizer.zero_grad()
    finding(verify(decayed), "additive term", "reference = parallel + 1/1000 x a.weight before the first step")


# ---- other places and times

def test_shards_that_are_gathered_in_the_wrong_order():
    def reversed_order(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        optimizer.step()
        weight = model.a.weight.detach()
        parts = [torch.empty(WIDTH // 2, WIDTH) for _ in range(2)]
        dist.all_gather(parts, weight.chunk(2)[dist.get_rank()].contiguous())
        weight.copy_(torch.cat(parts[::-1]))
    finding(verify(reversed_order, ranks=2), "permutation", "updated parameter holds the reference's elements in other places: shifted by 2 along dimension 0")


def test_a_transposed_gradient():
    def transposed(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.a.weight.grad = model.a.weight.grad.t().contiguous()
        optimizer.step()
    finding(verify(transposed), "permutation", "transposed (dimensions 0 and 1 change places)")


def test_blocks_in_another_order():
    def blocks(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.head.weight.grad = model.head.weight.grad[[0, 2, 1, 3, 4]]
        optimizer.step()
    finding(verify(blocks), "permutation", "along dimension 0: [1:2] is the reference's [2:3], [2:3] is the reference's [1:2]")


def test_the_gradient_of_another_tensor():
    def swapped(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        model.a.weight.grad, model.b.weight.grad = model.b.weight.grad, model.a.weight.grad
        optimizer.step()
    finding(verify(swapped), "other tensor", "another value of the reference: the gradient of b.weight, step 1")


def test_a_factor_that_two_numbers_may_be():
    names = Names({(0, 1): "", (2, 3): ""}, 4, 4)
    assert names.of_factor(Fraction(4)) == "the number of ranks = the number of microbatches"
    assert names.of_factor(Fraction(1, 2)) == "1/(the size of the group [0, 1])"
    assert Names({(0, 1): "dp"}, 2, 2).of_factor(Fraction(2)) == "dp = the number of microbatches"


def test_a_gradient_of_the_step_before():
    def late(model, data, optimizer):
        old = model.a.weight.grad
        model.zero_grad()
        losses(model, data["x"], data["labels"]).backward()
        kept = model.a.weight.grad
        if old is not None:
            model.a.weight.grad = model.kept
        optimizer.step()
        model.kept = kept
        model.a.weight.grad = kept

    def fresh(model, data, optimizer):
        model.zero_grad()
        losses(model, data["x"], data["labels"]).backward()
        optimizer.step()
    finding(verify(late, fresh, steps=2), "stale", "of step 1")


def test_a_parameter_that_one_rank_never_updates():
    def frozen(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        old = model.b.weight.detach().clone()
        optimizer.step()
        if dist.get_rank() == 1:
            model.b.weight.detach().copy_(old)
    f = finding(verify(frozen, ranks=2), "never updated", "updated parameter is never updated on these ranks")
    assert f.diagnostic.ranks == (1,)


def test_state_that_stays_zero():
    def reset(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        optimizer.step()
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
        optimizer.zero_grad()
    report = verify(reset, steps=1, momentum=0.9)
    assert report.findings[0].diagnosis == "never updated", report.findings[0]


# ---- memory and decisions

def test_uninitialised_memory():
    def unwritten(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        whole = torch.empty(WIDTH, WIDTH)
        whole[1:] = model.a.weight.grad[1:]
        model.a.weight.grad = whole
        optimizer.step()
    report = verify(unwritten)
    assert report.findings[0].diagnosis == "uninitialised" and report.findings[0].diagnostic.code == "REL009"


def test_a_decision_of_other_values_is_the_cause():
    def chosen(shift):
        def step(model, data, optimizer):
            h = model.a(data["x"])
            at = (h + shift * model.b(data["x"])).topk(2).indices
            loss = h.gather(-1, at).square().sum() + losses(model, data["x"], data["labels"])
            loss.backward()
            optimizer.step()
        return step
    report = verify(chosen(1.0), chosen(0.0))
    assert report.verdict == "REFUTED"
    assert report.findings[0].diagnosis == "decision" and report.findings[0].diagnostic.code == "REL008"
    assert [d.code for d in report.diagnostics if d.severity == "error"] == []


def test_a_decision_that_follows_from_a_wrong_gradient_is_a_note():
    def clipped(factor):
        def step(model, data, optimizer):
            (losses(model, data["x"], data["labels"]) * factor).backward()
            norm = sum(p.grad.square().sum() for p in model.parameters()).item()
            if norm > 1e-6:
                for p in model.parameters():
                    p.grad.mul_(1e-3 / norm)
            optimizer.step()
            optimizer.zero_grad()
        return step
    report = verify(clipped(2.0), clipped(1.0))
    finding(report, "multiple", "gradient is 2 x the reference")
    assert [(d.code, d.severity) for d in report.diagnostics if d.code == "REL008"] == [("REL008", "note")]
