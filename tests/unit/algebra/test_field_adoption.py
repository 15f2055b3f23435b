"""Adoption: values that only one pair of residues determines get the same companion on both sides."""
import torch

from trainverify.algebra.field import Field

from .fieldkit import agree, columns, logsumexp, rows, softmax, symbols, through_memory


def two_ways(m, x):
    """exp(x) computed at once, and as a product."""
    return m.exp(x), m.mul(m.exp(m.scale(x, 0.25)), m.exp(m.scale(x, 0.75)))


def test_without_memory_the_companion_depends_on_the_way():
    m = Field(1)
    a, b = two_ways(m, symbols(m, 1, 4))
    assert m.equal(a, b).all() and not (a.res[2:] == b.res[2:]).any()


def test_stored_values_take_the_companion_of_the_first():
    m = Field(1)
    x = symbols(m, 1, 4)
    first = through_memory(m, two_ways(m, x)[0])
    assert torch.equal(through_memory(m, two_ways(m, x)[1]).res, first.res)
    m.begin_side("parallel")
    assert torch.equal(through_memory(m, two_ways(m, x)[1]).res, first.res)


def test_what_enters_a_function_takes_it_without_memory():
    m = Field(1)
    a, b = two_ways(m, symbols(m, 1, 4))
    assert m.equal(m.exp(a), m.exp(b)).all() and m.equal(m.sin(a), m.sin(b)).all() and m.equal(m.maximum(a, b), a).all()


def test_untainted_operands_are_found_too():
    """The reference's x never meets exp; the parallel side's is log(exp(x)), exp(log(x)) and the like."""
    for f in ("exp", "sin", "log"):
        call = lambda m, x, f=f: getattr(m, f)(x)
        assert agree(call, lambda m, x: call(m, m.exp(m.log(x))), (4,))
        assert agree(lambda m, x: call(m, m.exp(m.log(x))), call, (4,))
        assert agree(call, lambda m, x: call(m, m.log(m.exp(x))), (4,))


def test_logarithms_of_logarithms():
    reference = lambda m, x: m.log(logsumexp(m, x))
    blocks = lambda m, x: m.log(through_memory(m, m.log(m.add(m.exp(logsumexp(m, columns(m, x, 0, 3))), m.exp(logsumexp(m, columns(m, x, 3, 6)))))))
    assert agree(reference, blocks, (4, 6))
    assert not agree(reference, lambda m, x: m.log(logsumexp(m, columns(m, x, 0, 5))), (4, 6))


def layer(m, x, w, split):
    """x + softmax(x w) with the product whole, or as partial sums of two ranks."""
    if split:
        h = m.add(through_memory(m, m.matmul(columns(m, x, 0, 2), rows(m, w, 0, 2))), m.matmul(columns(m, x, 2, 4), rows(m, w, 2, 4)))
        e = m.exp(through_memory(m, m.sub(h, m.amax(h, [-1], True))))
        return through_memory(m, m.add(x, m.mul(e, m.inv(m.sum(e, [-1], True)))))
    return through_memory(m, m.add(x, softmax(m, through_memory(m, m.matmul(x, w)))))


def deep(split, depth=6, wrong=None):
    def f(m, x, w):
        for i in range(depth):
            x = layer(m, x, w, split)
            if i == wrong:
                x = m.add(x, m.scale(columns(m, x, 0, 1), 1e-6))
        return [x, m.log(m.sum(m.exp(x), [-1]))]
    return f


def test_depth_does_not_lose_equality():
    assert agree(deep(False), deep(True), (3, 4), (4, 4)) and agree(deep(True), deep(False), (3, 4), (4, 4))
    assert not agree(deep(False), deep(True, wrong=2), (3, 4), (4, 4))


def test_a_second_step_with_updated_weights():
    """Weights that a gradient of softmax changed are themselves inputs of the next exp."""
    def train(split):
        def f(m, x, w):
            for _ in range(2):
                p = layer(m, x, w, split)
                parts = [m.matmul(m.permute(rows(m, x, s, s + 2), (1, 0)), rows(m, p, s, s + 2)) for s in (0, 2)] if split else [
                    m.matmul(m.permute(x, (1, 0)), p)]
                grad = parts[0] if len(parts) == 1 else m.add(*[through_memory(m, v) for v in parts])
                w = through_memory(m, m.sub(w, m.scale(grad, 0.1)))
            return w
        return f
    assert agree(train(False), train(True), (4, 4), (4, 4))


def test_garbage_and_masks_survive_adoption():
    m = Field(1)
    x = m.where(torch.tensor([True, False, True]), m.exp(symbols(m, 1, 3)), m.garbage("g", 3))
    stored = through_memory(m, m.where(torch.tensor([False, True, True]), x, m.const(float("-inf"))))
    assert stored.sp.tolist() == [2, 4, 0]
    assert through_memory(m, m.add(x, x)).sp.tolist() == [0, 4, 0]


def test_gradients_and_updates_are_settled_in_the_next_forward():
    """They are most of a step's elements and no exponents: their companions are kept when a forward stores or exponentiates them."""
    m = Field(1)
    stored = {}
    for side, way in (("reference", 0), ("parallel", 1)):
        m.begin_side(side)
        x = symbols(m, 1, 4)
        m.at(0, 0, 0, "optimizer")
        update = through_memory(m, two_ways(m, x)[way])
        m.at(0, 1, 0, "forward")
        stored[side] = update, through_memory(m, m.add(update, x)), m.exp(update)
    (a, forward_a, exp_a), (b, forward_b, exp_b) = stored.values()
    assert m.equal(a, b).all() and not (a.res[2:] == b.res[2:]).any()
    assert torch.equal(forward_a.res, forward_b.res) and m.equal(exp_a, exp_b).all()


def test_roots_of_many_second_moments_are_not_remembered():
    m = Field(1)
    m.at(0, 0, 0, "optimizer")
    few, many = symbols(m, 1, 1000), symbols(m, 1, 2000)
    assert m.equal(m.pow(m.sqrt(few), 2), few).all() and not m.equal(m.pow(m.sqrt(many), 2), many).all()
    m.at(0, 0, 0, "forward")
    assert m.equal(m.pow(m.sqrt(many), 2), many).all()
