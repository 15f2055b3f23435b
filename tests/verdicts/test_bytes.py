"""Types of memory: casts to eight bits, bytes read as another type, memory that plain data is written over."""
import torch
import torch.distributed as dist

from judge import assert_equal, assert_not_equal, assert_refuted, assert_unknown, line_of
from pairs import compare_forward

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


def product(h):
    return h * h.detach()


def with_size(h):
    return h * h.detach().abs()


# -- eight bits

def through(dtype, scale, back):
    """h times its size, which went through `dtype` by a scale that follows h."""
    def f(h):
        s = scale / (h.detach().square().sum() + 1)
        return h * (h.detach().abs() * s).to(dtype).to(h.dtype) / (back * s)
    return f


def test_casts_to_eight_bits_are_the_identity():
    parts = [through(dtype, 192.0, 1.0) for dtype in FLOAT8]
    assert_equal(compare_forward(lambda h: 5 * with_size(h), lambda h: sum(f(h) for f in parts)))


def test_the_scale_of_a_cast_to_eight_bits_is_taken_back():
    assert_refuted(compare_forward(with_size, through(torch.float8_e4m3fn, 192.0, 2.0)))


def test_what_is_too_large_for_eight_bits_is_a_matter_of_rounding():
    assert_equal(compare_forward(with_size, through(torch.float8_e4m3fn, 1e6, 1.0)))


def test_eight_bits_are_moved_and_gathered():
    def gathered(h):
        mine = h.detach().to(torch.float8_e5m2).chunk(2, 1)[dist.get_rank()].contiguous()
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        return h * torch.cat(parts, 1).to(h.dtype)
    assert_equal(compare_forward(product, gathered, ranks=2))


# -- bytes as another type

def test_a_float_is_not_another_float_of_the_same_width():
    def strange(h):
        return h * h.detach().bfloat16().view(torch.float16).float()
    report = compare_forward(product, strange)
    assert_unknown(report, "OPS006", line_of(strange, "view"))


def test_masks_that_are_read_several_at_once_are_not_cast_one_by_one():
    def pairs(h):
        return h * (h > 0).view(torch.int16).float().sum()

    def again(h):
        return h * (2 * h > 0).view(torch.int16).float().sum()
    assert_unknown(compare_forward(pairs, again), "OPS006", line_of(pairs, "view"), line_of(again, "view"))


def test_bits_of_a_float_are_no_constants():
    def bits(h):
        exponents = h.detach().view(torch.int32) >> 23
        return h * exponents
    assert_unknown(compare_forward(bits, bits), "OPS006", line_of(bits, ">>"))


def test_bits_that_leave_for_python_are_no_constants():
    def bits(h):
        sign = h.detach().view(torch.int32).tolist()[0][0] >= 0
        return h * 2 if sign else h
    assert_unknown(compare_forward(bits, bits), "OPS006", line_of(bits, "tolist"))


def test_bytes_that_travel_as_integers_are_not_followed():
    def gathered(h):
        mine = h.detach().to(torch.bfloat16).view(torch.int16)
        other = torch.empty_like(mine)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        other.copy_(mine)
        return h * other.view(torch.bfloat16).float()
    report = compare_forward(product, gathered, ranks=2)
    assert_unknown(report, "OPS006", line_of(gathered, "all_reduce"))


def test_floats_that_are_only_moved_as_bytes_stay_what_they_are():
    def broadcast(h):
        mine = h.detach().clone() if dist.get_rank() == 0 else torch.zeros_like(h)
        dist.broadcast(mine.view(torch.uint8), 0)
        parts = [torch.empty(5, 24, dtype=torch.uint8) for _ in range(2)]
        dist.all_gather(parts, mine.view(torch.uint8))
        if dist.get_rank():
            dist.send(mine.view(torch.int16), 0)
        else:
            dist.recv(mine.view(torch.int16), 1)
        return h * (mine + parts[1 - dist.get_rank()].view(torch.float32)) / 2

    def from_the_wrong_place(h):
        mine = h.detach().clone()
        parts = torch.empty(2, 5, 24, dtype=torch.uint8)
        dist.all_gather_into_tensor(parts, mine.view(torch.uint8))
        return h * parts.view(torch.float32)[1, :, [1, 0, 2, 3, 4, 5]]
    assert_equal(compare_forward(product, broadcast, ranks=2))
    assert_refuted(compare_forward(product, from_the_wrong_place, ranks=2))


def test_bytes_that_arrive_shifted_are_no_floats():
    def shifted(h):
        mine = torch.cat((h.detach().flatten(), torch.zeros(1)))
        raw = mine.view(torch.uint8)
        other = torch.zeros_like(mine)
        dist.all_gather([other.view(torch.uint8)[1:121]], raw[:120])
        return h * other[:30].view(5, 6)
    assert_unknown(compare_forward(product, shifted, ranks=1), "OPS006", line_of(shifted, "all_gather"))


def test_bytes_that_are_moved_and_also_computed_with_are_not_followed():
    def changed(h):
        mine = h.detach().clone()
        dist.broadcast(mine.view(torch.int32), 0)
        mine.view(torch.int32).add_(1 << 23)
        return h * mine / 2
    assert_unknown(compare_forward(product, changed, ranks=2), "OPS006", line_of(changed, "broadcast"))


# -- plain data over what depends on symbols

def test_a_mask_that_is_set_in_part_keeps_the_rest():
    def positive(h):
        mask = h.detach() > 0
        mask[0] = True
        return h * mask

    def nearly(h):
        mask = h.detach() > -1e-7
        mask[0] = True
        return h * mask
    assert_equal(compare_forward(positive, positive))
    assert_not_equal(compare_forward(positive, nearly), "loss")


def test_a_mask_that_is_overwritten_is_forgotten():
    def kept(h):
        mask = h.detach() > 0
        mask.fill_(True)
        return h * mask
    assert_equal(compare_forward(lambda h: h * 1, kept))


def test_a_mask_that_a_collective_overwrites_is_forgotten():
    def kept(h):
        mask = h.detach() > 0
        if dist.get_rank() == 0:
            mask = torch.ones(5, 6, dtype=torch.bool)
        dist.broadcast(mask, 0)
        return h * mask
    assert_equal(compare_forward(lambda h: h * 1, kept, ranks=2))


def test_a_float_that_integers_overwrite_is_not_what_it_was():
    def zeroed(h):
        copy = h.detach().clone()
        copy.view(torch.int32).fill_(0)
        return h * copy

    def zeroed_in_part(h):
        both = torch.zeros(2, 5, 6)
        both[1] = h.detach()
        both[1].view(torch.int32).fill_(0)
        return h * both[1]
    assert_not_equal(compare_forward(product, zeroed), "loss")
    assert_not_equal(compare_forward(product, zeroed_in_part), "loss")


def test_a_loaded_float_that_integers_overwrite_is_not_what_it_was():
    def zeroed(h):
        data = torch.frombuffer(bytearray(h.detach().numpy().tobytes()), dtype=torch.float32).reshape(5, 6)
        data.view(torch.int32).fill_(0)
        return h * data
    assert_not_equal(compare_forward(product, zeroed), "loss")
