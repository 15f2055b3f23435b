"""Repairs of what is read and of how much of it counts: parts that changed places, this rank's part of the batch, terms, weights, norms."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv
from test_repair import line, total
from trainverify.diagnose import repair
from trainverify.report.model import Report

ROWS, WIDTH, CLASSES = 6, 4, 5


class Gated(nn.Module):
    """The gate and what it lets through are the halves of one product."""

    def __init__(self):
        super().__init__()
        self.both, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.head(F.silu(gate) * up)


class Swapped(Gated):
    def forward(self, x):
        up, gate = self.both(x).chunk(2, -1)
        return self.head(F.silu(gate) * up)


def loss_of(logits, labels, reduction="mean"):
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)


def plain(model, batch):
    return loss_of(model(batch["x"]), batch["labels"])


def verify(step, loss=plain, made=Gated, clip=None, ranks=2, whole_model=Gated) -> Report:
    """step(model, batch) makes gradients and returns the loss; then SGD. clip(parameters) scales gradients and returns their norm."""
    def training(model, batch, gradients, clip):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def one():
            scalars = {"loss": gradients(model, batch)}
            if clip is not None:
                scalars["norm"] = clip(list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            return scalars
        return tv.Training(model, one, batch=batch)

    def whole(model, batch):
        value = loss(model, batch)
        value.backward()
        return value

    def reference():
        torch.manual_seed(0)
        batch = {"x": torch.randn(ROWS, WIDTH), "labels": torch.tensor([0, -100, 2, 3, 1, 4])}
        return training(whole_model(), batch, whole, clip and (lambda ps: nn.utils.clip_grad_norm_(ps, 0.1)))

    def parallel(ref):
        dist.init_process_group("gloo")
        model = made()
        model.load_state_dict(ref.weights)
        return training(model, ref.batch, step, clip)

    return tv.verify(reference, parallel, ranks=ranks, timeout=60.0)


def mended(report: Report, diagnosis: str, *words: str) -> None:
    """One finding of that class, with a verified repair that says these words."""
    assert report.verdict == "REFUTED" and len(report.findings) == 1, report.findings
    (finding,) = report.findings
    told = str(finding.repair).replace(__file__, "here")
    assert finding.diagnosis == diagnosis, finding
    assert finding.repair is not None and finding.repair.verified and all(w in told for w in words), told


def sum_grads(model):
    for p in model.parameters():
        dist.all_reduce(p.grad)


@pytest.mark.slow
def test_the_halves_of_a_product_changed_places():
    def step(model, batch):
        x, labels = (batch[k].chunk(2)[dist.get_rank()] for k in ("x", "labels"))
        loss = loss_of(model(x), labels, "sum") / total((batch["labels"] != -100).sum()) * 2
        loss.backward()
        sum_grads(model)
        return total(loss)

    mended(verify(step, made=Swapped), "other", "read the other of the parts", "here:")


class InHalvesAndQuarters(Gated):
    """One product is read in halves and in quarters."""

    def forward(self, x):
        both = self.both(x)
        gate, up = both.chunk(2, -1)
        return self.head(F.silu(gate) * up) + both.chunk(4, -1)[3].sum()


class SwappedHalves(Gated):
    def forward(self, x):
        both = self.both(x)
        up, gate = both.chunk(2, -1)
        return self.head(F.silu(gate) * up) + both.chunk(4, -1)[3].sum()


@pytest.mark.slow
def test_a_value_that_is_read_in_parts_of_two_sizes():
    """The halves that changed places are not looked for among the quarters: that was an error of our own."""
    def step(model, batch):
        value = plain(model, batch)
        value.backward()
        return value

    report = verify(step, made=SwappedHalves, whole_model=InHalvesAndQuarters, ranks=1)
    assert report.verdict == "REFUTED" and report.findings[0].repair is not None, report.findings


@pytest.mark.slow
def test_labels_of_another_rank():
    def step(model, batch):
        rank = dist.get_rank()
        x, labels = batch["x"].chunk(2)[rank], batch["labels"].chunk(2)[1 - rank]
        loss = loss_of(model(x), labels, "sum") / total((labels != -100).sum())
        loss.backward()
        sum_grads(model)
        return total(loss)

    mended(verify(step), "other", "take this rank's own, by its place in all ranks, of the 2 parts of batch['labels']")


@pytest.mark.slow
def test_microbatches_that_count_alike():
    def step(model, batch):
        rank, reported = dist.get_rank(), 0.0
        for x, labels in zip(batch["x"].chunk(2)[rank].split((2, 1)), batch["labels"].chunk(2)[rank].split((2, 1))):
            loss = loss_of(model(x), labels) / 4
            loss.backward()
            reported = reported + loss.detach()
        sum_grads(model)
        return total(reported)

    mended(verify(step), "reweighted", "scale the losses at here:", "by 4/5, 4/5 on rank 0", "by 8/5, 4/5 on rank 1")


def extra(model):
    return 0.5 * model.both.weight.square().mean()


@pytest.mark.slow
def test_a_term_of_the_loss_that_every_rank_adds():
    def step(model, batch):
        x, labels = (batch[k].chunk(2)[dist.get_rank()] for k in ("x", "labels"))
        main = loss_of(model(x), labels, "sum") / total((labels != -100).sum())
        more = extra(model)
        (main + more).backward()
        sum_grads(model)
        return total(main) + more.detach()

    report = verify(step, lambda model, batch: plain(model, batch) + extra(model))
    mended(report, "reweighted", f"scale by 1/2 the gradient of what here:{line(extra, '0.5')}")


@pytest.mark.slow
def test_a_norm_of_what_one_rank_holds():
    def clip(parameters):
        mine = parameters[dist.get_rank()::2]
        norm = torch.stack([p.grad.norm() for p in mine]).norm()
        for p in parameters:
            p.grad.mul_((0.1 / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(model, batch):
        loss = plain(model, batch)
        loss.backward()
        return loss

    mended(verify(step, clip=clip), "partial sum", "sum the square of the norm over all ranks")


# ---- sums over other ranks
class Halves(nn.Module):
    """Two heads, of which the first sees the first half of the rows."""

    def __init__(self, names=("a", "b")):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES) for name in names})


def heads_training(model, gradients):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        gradients()
        optimizer.step()
        optimizer.zero_grad()
    return step


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False], ids=["a group of the program", "a group that the program lacks"])
def test_shares_are_summed_over_another_group(grouped):
    def reference():
        torch.manual_seed(0)
        model, batch = Halves(), {"x": torch.randn(8, WIDTH), "labels": torch.tensor([0, 1, 2, 3, 4, 0, 2, 1])}

        def gradients():
            for name, rows in (("a", slice(0, 4)), ("b", slice(4, 8))):
                loss_of(model.heads[name](batch["x"][rows]), batch["labels"][rows], "sum").backward()
        return tv.Training(model, heads_training(model, gradients), batch=batch)

    def parallel(ref):
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        name, rows = "ab"[rank // 2], slice(2 * rank, 2 * rank + 2)
        model = Halves((name,))
        model.load_state_dict({k: v for k, v in ref.weights.items() if f".{name}." in k})
        groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], *([[0, 1], [2, 3]] if grouped else []))]

        def gradients():
            loss_of(model.heads[name](ref.batch["x"][rows]), ref.batch["labels"][rows], "sum").backward()
            for p in model.parameters():
                dist.all_reduce(p.grad, group=groups[rank % 2])
        return tv.Training(model, heads_training(model, gradients))

    mended(tv.verify(reference, parallel, ranks=4, timeout=60.0), "wrong group", "ranks [0, 1] and ranks [2, 3] instead of ranks [0, 2] and ranks [1, 3]")


# ---- how much is tried
class Summed(torch.autograd.Function):
    """The sum of all ranks' shares; the gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(x)


class RowParallel(Head):
    """Each rank multiplies with one column of the head, and adds all of its bias before the sum."""

    def forward(self, x):
        own = slice(dist.get_rank(), dist.get_rank() + 1)
        return Summed.apply(F.linear(x[:, own].contiguous(), self.head.weight[:, own], self.head.bias))


@pytest.mark.slow
def test_a_bias_that_is_added_by_every_rank_is_tried_for_the_ranks_that_its_sum_is_over():
    def step(model, batch):
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        loss = plain(model, batch)
        loss.backward()
        dist.all_reduce(model.head.weight.grad)             # each rank has the gradient of its own column
        return total(loss, pairs[dist.get_rank() // 2]) / 2

    report = verify(step, made=RowParallel, whole_model=Head, ranks=4)
    mended(report, "additive term", "count the bias at", " 1/4 times")
    assert [p.detail for p in report.phases if p.name == "repair"] == ["2 trials"]      # of pairs, 1/2 would have been the first


@pytest.mark.slow
def test_a_loss_that_stays_wrong_ends_a_trial_before_its_backward(monkeypatch):
    def step(model, batch):
        """Both ranks of a pair have the same rows, and count the tokens of these alone."""
        rank = dist.get_rank()
        groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
        x, labels = (batch[k].chunk(2)[rank // 2] for k in ("x", "labels"))
        loss = loss_of(model(x), labels, "sum") / (labels != -100).sum()
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=groups[2 + rank % 2])
        return total(loss, groups[2 + rank % 2])

    replayed, found = [], []
    real = repair.replay
    monkeypatch.setattr(repair, "replay", lambda program, *rest: replayed.append(sum(len(t.ops) for t in program.traces)) or real(program, *rest))
    for little in (repair.LITTLE, 0.0):
        monkeypatch.setattr(repair, "LITTLE", little)
        replayed.clear()
        report = verify(step, ranks=4)
        found.append((report.findings, list(replayed)))
    (told, some), (again, every) = found
    assert told == again and told[0].repair is not None
    assert len(some) == len(every) + 1 and some[0] < 0.7 * every[0], (some, every)     # one that does not mend the loss, and one that does
