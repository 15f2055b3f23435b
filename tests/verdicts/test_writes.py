"""Memory that changes outside recorded operations, or is read between the issue of a collective and its wait."""
import torch
import torch.distributed as dist

from judge import assert_equal, assert_not_equal, assert_refuted, codes, line_of, messages, summary
from pairs import compare, compare_forward, forward, sgd, update


def product(h):
    return h * h.detach()


def test_hidden_write_into_a_buffer():
    def wrong(h):
        buffer = torch.zeros(5, 6)
        buffer.add_(h.detach())
        buffer.numpy()[:] *= 2
        return h * buffer

    report = compare_forward(product, wrong)
    assert_not_equal(report)
    assert "CONF002" in codes(report), summary(report)


def test_hidden_write_into_a_result():
    def wrong(h):
        copy = h.detach() * 1
        copy.numpy()[:] *= 3
        return h * copy

    report = compare_forward(product, wrong)
    assert_not_equal(report)
    assert "CONF002" in codes(report), summary(report)


def test_hidden_write_on_both_sides():
    def hidden(h):
        copy = h.detach() * 1
        copy.numpy()[:] *= 3
        return h * copy
    assert_not_equal(compare_forward(hidden, hidden))


def test_round_trip_through_numpy_is_not_seen_as_equal():
    def through(h):
        return h * torch.from_numpy(h.detach().numpy() * 1.0)
    assert_not_equal(compare_forward(through, through), "loss")
    assert_not_equal(compare_forward(product, through), "loss")


def test_reading_by_numpy_does_no_harm():
    def logged(h):
        assert h.detach().numpy().max() < 1e6
        return h * h.detach()
    assert_equal(compare_forward(product, logged))


# -- asynchronous collectives

def assert_race(report, line):
    """What is read before the wait is arbitrary: the value that it had shows a difference, or none is shown; the line is named."""
    assert report.verdict in ("REFUTED", "UNKNOWN"), summary(report)
    assert_not_equal(report)
    assert line in {d.span.line for d in messages(report) if d.code == "REL007"}, summary(report)


def summed_twice(wait):
    """h / 2 summed over 2 ranks, times 2."""
    def f(h):
        half = h.detach() / 2
        work = dist.all_reduce(half, async_op=True)
        if wait:
            work.wait()
        out = half * 2
        work.wait()
        return h * 0 + out
    return f


def test_result_is_used_after_its_wait():
    def right(h):
        return h * 0 + h.detach() * 2
    assert_equal(compare(forward(right), forward(summed_twice(True)), ranks=2))


def test_result_is_used_before_its_wait():
    def right(h):
        return h * 0 + h.detach() * 2

    f = summed_twice(False)
    assert_race(compare(forward(right), forward(f), ranks=2), line_of(f, "out = half"))


def test_result_that_nobody_waits_for():
    def right(h):
        return h * 0 + h.detach() * 2

    def wrong(h):
        half = h.detach() / 2
        dist.all_reduce(half, async_op=True)
        return h * 0 + half * 2

    assert_race(compare(forward(right), forward(wrong), ranks=2), line_of(wrong, "half * 2"))


def test_a_gradient_that_is_taken_before_its_wait_is_named():
    works = []                                # kept: a work that nobody holds counts as waited for by nobody all the same

    def hasty(parameters):
        works.append(dist.all_reduce(parameters[0].grad.div_(2), async_op=True))

    report = compare(update(sgd), update(sgd, hasty), ranks=2)
    assert_not_equal(report)
    assert any("the gradient w, as it is taken here, reads the result of an asynchronous all_reduce" in d.message for d in messages(report)), summary(report)


def test_input_is_overwritten_before_the_wait():
    def right(h):
        return h * 0 + torch.cat([h.detach()] * 2)[:5]

    def wrong(h):
        mine, all_ = h.detach() * 1, h.new_empty(10, 6)
        work = dist.all_gather_into_tensor(all_, mine, async_op=True)
        mine.zero_()
        work.wait()
        return h * 0 + all_[:5]

    assert_race(compare(forward(right), forward(wrong), ranks=2), line_of(wrong, "zero_"))


def received(early):
    """Rank 0's rows, sent to rank 1."""
    def f(h):
        if dist.get_rank() == 0:
            dist.isend(h.detach().contiguous(), 1).wait()
            return h * h.detach()
        box = torch.zeros(5, 6)
        work = dist.irecv(box, 0)
        if early:
            taken = box * 1
            work.wait()
            return h * taken
        work.wait()
        return h * box
    return f


def test_receive():
    assert_equal(compare(forward(product), forward(received(False)), ranks=2))


def test_receive_that_is_read_too_early():
    f = received(True)
    assert_race(compare(forward(product), forward(f), ranks=2), line_of(f, "taken = box"))


def test_reduction_with_the_wrong_op():
    def right(h):
        return h * 0 + h.detach()

    def wrong(h):
        total = h.detach() * 1
        dist.all_reduce(total)
        return h * 0 + total

    assert_refuted(compare(forward(right), forward(wrong), ranks=2), line_of(wrong, "all_reduce"))
