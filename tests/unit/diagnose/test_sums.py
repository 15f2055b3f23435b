"""Sums that are put together wrongly: over microbatches, ranks, and parameters of a norm; each says what is counted how often."""
import torch
import torch.distributed as dist

from test_classes import finding, losses, mine, names, verify


def test_a_gradient_that_is_cleared_between_microbatches():
    def cleared(model, data, optimizer):
        for x, labels in zip(data["x"].split([4, 2]), data["labels"].split([4, 2])):
            optimizer.zero_grad()
            (losses(model, x, labels, "sum") / 5).backward()
        optimizer.step()
    finding(verify(cleared), "additive term", "gradient is a sum of which a term is missing: share 1, made")


def test_a_gradient_that_is_reduced_before_the_last_microbatch():
    def early(model, data, optimizer):
        x, labels = mine(data, 2)
        for i, (part, its) in enumerate(zip(x.split([1, 2]), labels.split([1, 2]))):
            (losses(model, part, its, "sum") / 5).backward()
            if i == 0:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
        optimizer.step()
    finding(verify(early, ranks=2), "partial sum", "gradient is a part of the sum: share 2 of rank 1")


def test_a_gradient_that_is_reduced_after_every_microbatch():
    def again(model, data, optimizer):
        x, labels = mine(data, 2)
        for part, its in zip(x.split([1, 2]), labels.split([1, 2])):
            (losses(model, part, its, "sum") / 5).backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
        optimizer.step()
    f = finding(verify(again, ranks=2, repair=False), "reweighted", "count 2 : 1 : 2 : 1; in the reference 1 : 1 : 1 : 1")
    names(f, again, "all_reduce")
    assert f.diagnostic.fix.startswith("each gradient is summed 2-fold again with every later microbatch"), f.diagnostic


def test_a_right_value_and_a_multiple_are_added():
    def right(model, data, optimizer):
        h = model.a(data["x"])
        (h + h.exp()).square().sum().backward()
        optimizer.step()

    def doubled(model, data, optimizer):
        h = model.a(data["x"])
        (h + Sum.apply(h.exp())).square().sum().backward()
        optimizer.step()
    f = finding(verify(doubled, right, ranks=2), "multiple", "result is 2 x the reference's (2 = the number of ranks)")
    assert f.op == "c10d.allreduce_.default"


class Sum(torch.autograd.Function):
    """Adds up what is the same on every rank already."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def clipped_by(norm_of):
    def step(model, data, optimizer):
        losses(model, data["x"], data["labels"]).backward()
        norm = norm_of(model)
        for p in model.parameters():
            p.grad.mul_(1e-3 / norm)
        optimizer.step()
        return {"norm": norm}
    return step


def squares(parameters):
    return sum(p.grad.square().sum() for p in parameters)


def right_norm(model):
    return squares(model.parameters()).sqrt()


def test_a_norm_that_counts_a_parameter_twice():
    def twice(model):
        return (squares(model.parameters()) + model.b.weight.grad.square().sum()).sqrt()
    finding(verify(clipped_by(twice), clipped_by(right_norm)), "additive term", "b.weight counts 2 times", "norm^2 = reference's + 1 x the squares of b.weight")


def test_a_norm_that_leaves_a_parameter_out():
    def without(model):
        return squares([model.a.weight, model.b.weight]).sqrt()
    finding(verify(clipped_by(without), clipped_by(right_norm)), "additive term", "head.weight is not counted")


def test_a_norm_that_counts_replicas_on_every_rank():
    def summed(model):
        square = squares(model.parameters())
        dist.all_reduce(square)
        return square.sqrt()
    f = finding(verify(clipped_by(summed), clipped_by(right_norm), ranks=2, repair=False), "additive term", "hold is counted on each of them")
    assert "on one of them alone" in f.diagnostic.fix
