"""The reference fixes what is compared: absent outputs, shares of scalars, and equal values in the wrong place."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv
from judge import assert_equal, assert_not_equal, assert_refuted, assert_unknown, is_equal, output, summary
from pairs import LR, WIDTH, batch_of, compare, forward, sgd


class Pair(nn.Module):
    """(x @ first) @ second"""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return (x @ self.first) @ self.second


def trained(choose=lambda model: model.parameters(), momentum=0.0, report=("loss",), between=lambda model: None,
            prepare=lambda model, optimizer: None):
    def build(model, batch):
        optimizer = torch.optim.SGD(choose(model), lr=LR, momentum=momentum)

        def step():
            loss = F.cross_entropy(model(batch["x"]), batch["targets"])
            loss.backward()
            between(model)
            prepare(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            return {name: loss for name in report}
        return step
    return build


def against_right(build, right=trained(), **options):
    return compare(right, build, model=Pair, **options)


def test_everything_is_there():
    report = against_right(trained())
    assert_equal(report)
    assert {(o.kind, o.name) for o in report.outputs} >= {(k, n) for k in ("gradient", "parameter") for n in ("first", "second")}


def test_parameter_that_is_never_updated():
    report = against_right(trained(lambda model: [model.first]))
    assert_refuted(report)
    assert output(report, "second", "parameter").verdict == "REFUTED", summary(report)
    assert not is_equal(output(report, "second", "gradient")), summary(report)


def test_gradient_that_is_none():
    def frozen(model):
        model.second.requires_grad_(False)
        return model.parameters()
    report = against_right(trained(frozen))
    assert_refuted(report)
    assert not is_equal(output(report, "second", "gradient")), summary(report)


def test_gradient_that_is_dropped_on_one_rank():
    def drop(model):
        if dist.get_rank() == 1:
            model.first.grad = None
    report = against_right(trained(between=drop), ranks=2)
    assert not is_equal(output(report, "first", "gradient")), summary(report)
    assert_refuted(report)


def test_momentum_that_is_not_kept():
    report = against_right(trained(), right=trained(momentum=0.9))
    assert_not_equal(report, "first::momentum_buffer", "second::momentum_buffer")
    assert is_equal(output(report, "first", "parameter")), summary(report)


def test_momentum_in_the_wrong_place():
    """Each is a state that the reference has: the other parameter's, or the one of the step before."""
    def swap(model, optimizer):
        a, b = (optimizer.state[p] for p in (model.first, model.second))
        if "momentum_buffer" in a:
            a["momentum_buffer"], b["momentum_buffer"] = b["momentum_buffer"], a["momentum_buffer"]

    def stale(model, optimizer):
        for p in model.parameters():
            optimizer.state[p].pop("momentum_buffer", None)

    right = trained(momentum=0.9)
    for before in (swap, stale):
        report = against_right(trained(momentum=0.9, prepare=before), right=right, steps=2)
        assert_refuted(report)
        assert output(report, "first::momentum_buffer", step=2).verdict == "REFUTED", summary(report)
        assert is_equal(output(report, "first::momentum_buffer", step=1)), summary(report)


def by_turns(skipped=-1):
    """Flat copies of the parameters, which the optimizer is shown one at a time and for its step only."""
    def build(model, batch):
        parameters = list(model.parameters())
        masters = [nn.Parameter(p.detach().reshape(-1).clone()) for p in parameters]
        optimizer = torch.optim.SGD(masters, lr=LR, momentum=0.9)

        def step():
            loss = F.cross_entropy(model(batch["x"]), batch["targets"])
            loss.backward()
            for i, (parameter, master) in enumerate(zip(parameters, masters)):
                master.grad, parameter.grad = parameter.grad.reshape(-1), None
                optimizer.param_groups[0]["params"] = [master]
                optimizer.step()
                optimizer.param_groups[0]["params"] = []
                parameter.data.copy_(master.detach().view_as(parameter))
                if i == skipped:
                    optimizer.state[master]["momentum_buffer"].mul_(2)
            return {"loss": loss}
        return step
    return build


def test_parameters_that_an_optimizer_sees_by_turns():
    assert_equal(against_right(by_turns(), trained(momentum=0.9), steps=2))


def test_state_of_a_parameter_that_an_optimizer_sees_by_turns():
    report = against_right(by_turns(skipped=1), trained(momentum=0.9), steps=2)
    assert_refuted(report)
    assert output(report, "second::momentum_buffer", "state").verdict == "REFUTED", summary(report)
    assert is_equal(output(report, "first::momentum_buffer", "state")), summary(report)


def shards_of_rank(late=False):
    """Parameters that are whole only while they are used; a rank keeps half of each in `ds_tensor`, which follows the optimizer's copy. late: one does not."""
    def build(model, batch):
        rank = dist.get_rank()
        masters = {}
        for p in model.parameters():
            p.ds_tensor = p.detach().reshape(-1).chunk(2)[rank].clone()
            masters[p] = nn.Parameter(p.ds_tensor.clone())
            p.data = torch.empty(0)
        optimizer = torch.optim.SGD(masters.values(), lr=LR)

        def step():
            for p in masters:
                whole = torch.empty(WIDTH * WIDTH)
                dist.all_gather_into_tensor(whole, p.ds_tensor)
                p.data = whole.view(WIDTH, WIDTH)
            loss = F.cross_entropy(model(batch["x"]), batch["targets"])
            loss.backward()
            for p, master in masters.items():
                master.grad, p.grad, p.data = p.grad.reshape(-1).chunk(2)[rank].clone(), None, torch.empty(0)
            optimizer.step()
            for p, master in masters.items():
                if not (late and p is model.second):
                    p.ds_tensor.copy_(master.detach())
            return {"loss": loss}
        return step
    return build


def test_parameters_that_are_whole_while_they_are_used():
    assert_equal(against_right(shards_of_rank(), ranks=2, steps=2))


def test_a_kept_share_that_is_not_updated():
    report = against_right(shards_of_rank(late=True), ranks=2)
    assert_refuted(report)
    assert output(report, "second", "parameter").verdict == "REFUTED", summary(report)
    assert is_equal(output(report, "first", "parameter")), summary(report)


def test_scalar_that_nobody_reports():
    report = against_right(trained(report=("loss",)), right=trained(report=("loss", "again")))
    assert_unknown(report, "REL005")
    assert_not_equal(report, "again")


def test_parameter_that_no_rank_holds():
    class Half(nn.Module):
        """Its second matrix is a constant, which no optimizer and no state dict knows."""

        def __init__(self, ref):
            super().__init__()
            self.first = nn.Parameter(ref.weights["first"].clone())
            self.constant = ref.weights["second"].clone()

        def forward(self, x):
            return (x @ self.first) @ self.constant

    def reference():
        torch.manual_seed(0)
        model, batch = Pair(), batch_of()
        return tv.Training(model, trained()(model, batch), batch=batch)

    def parallel(ref):
        model = Half(ref)
        return tv.Training(model, trained()(model, ref.batch))

    report = tv.verify(reference, parallel, ranks=1, steps=1)
    assert_unknown(report, "REL005")
    assert is_equal(output(report, "first", "parameter")), summary(report)
    assert not is_equal(output(report, "second", "parameter")), summary(report)
    assert not is_equal(output(report, "second", "gradient")), summary(report)


def test_equal_values_in_the_wrong_place():
    """Each gradient is one that the reference has: for the other parameter."""
    def swap(model):
        model.first.grad, model.second.grad = model.second.grad, model.first.grad
    report = against_right(trained(between=swap))
    assert_refuted(report)
    assert output(report, "first", "gradient").verdict == "REFUTED", summary(report)


# -- scalars that are a rank's share

def on_my_rows(declare, shares=2):
    """Each rank's loss over its own rows; the gradients are those of the whole batch."""
    def build(model, batch):
        optimizer = sgd(model.parameters())
        x, targets = (batch[k].chunk(shares)[dist.get_rank()] for k in ("x", "targets"))

        def step():
            loss = F.cross_entropy(model(x), targets)
            loss.backward()
            for p in model.parameters():
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                p.grad /= shares
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": declare(loss)}
        return step
    return build


def shares(declare):
    return compare(trained(), on_my_rows(declare), model=Pair, batch=lambda: batch_of(6), ranks=2)


def test_undeclared_share():
    report = shares(lambda loss: loss)
    assert_unknown(report, "REL006")
    assert not is_equal(output(report, "loss")), summary(report)
    assert is_equal(output(report, "first", "gradient")), summary(report)


def test_declared_mean():
    assert_equal(shares(lambda loss: tv.local(loss, reduce="mean")))


def test_declared_sum():
    assert_equal(shares(lambda loss: tv.local(loss / 2, reduce="sum")))


def test_share_declared_as_what_it_is_not():
    assert_refuted(shares(lambda loss: tv.local(loss, reduce="sum")))


def test_share_of_a_group():
    assert_equal(shares(lambda loss: tv.local(loss, reduce="mean", group=dist.group.WORLD)))
