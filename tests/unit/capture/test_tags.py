"""Tags are distinct, near the initial values, recognisable, and decode to their symbols."""
import numpy as np
import pytest
import torch

from trainverify.capture.tags import BASE, Tagger, TagTable, digit_values, digits_of, is_checksummed


def test_distinct_over_all_tensors_and_near():
    tagger = Tagger(0)
    rng = np.random.default_rng(0)
    tensors = [np.ones(300), np.zeros(300), rng.normal(0, 0.02, 20_000), np.full(5, -3.0), np.array([1e-9, 0.0, 5.0])]
    tags = [tagger.tag(t.astype(np.float32), "float32") for t in tensors]
    every = np.concatenate([t.values for t in tags])
    assert all(t.distinct for t in tags) and np.unique(every).size == every.size
    assert is_checksummed(every).all() and (every != 0).all() and np.isfinite(every).all()
    assert np.abs(tags[0].values - 1).max() <= 0.5 and np.abs(tags[1].values).max() < 0.5
    assert np.corrcoef(tags[2].values, tensors[2])[0, 1] > 0.9


def test_common_numbers_are_no_tags():
    common = np.array([0, 1, -1, 0.5, 2, 3, 0.25, 1e4, 100], dtype=np.float32)
    assert not is_checksummed(common).any()
    random = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    assert is_checksummed(random).mean() < 0.03


def test_second_moments_stay_positive():
    tagger = Tagger(3)
    assert (tagger.tag(np.zeros(1000, np.float32), "float32", positive=True).values > 0).all()
    assert (tagger.tag(np.full(1000, 1e-8, np.float32), "float32", positive=True).values > 0).all()


def test_other_seeds_give_other_values():
    a, b = (Tagger(s).tag(np.ones(100, np.float32), "float32").values for s in (0, 1))
    assert not np.isin(a, b).all() and (a == Tagger(0).tag(np.ones(100, np.float32), "float32").values).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routings_have_values_of_their_own_farther_away(dtype):
    start = np.random.default_rng(0).normal(0, 0.02, 300).astype(np.float32)
    near, first, second, again = (Tagger(5, routing=r).tag(start, dtype) for r in (0, 1, 2, 1))
    assert all(t.distinct for t in (near, first, second)) and (first.values == again.values).all()
    moved = [np.abs(t.values - start).mean() for t in (near, first, second)]
    assert min(moved[1:]) > 3 * moved[0] and not np.isin(first.values, second.values).all()
    assert np.abs(first.values).max() < 10 * np.abs(start).max()


def to_bfloat16(x):
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(("dtype", "exact"), [("bfloat16", to_bfloat16), ("float16", lambda x: x.astype(np.float16).astype(np.float32))])
def test_narrow_types(dtype, exact):
    tagger = Tagger(0)
    few = tagger.tag(np.random.default_rng(0).normal(size=64).astype(np.float32), dtype)
    assert few.distinct and (exact(few.values) == few.values).all() and np.unique(few.values).size == 64
    assert not np.isin(tagger.tag(np.ones(1000, np.float32), "float32").values, few.values).any()


def test_narrow_type_that_is_too_narrow():
    tags = Tagger(0).tag(np.ones(5000, np.float32), "bfloat16")
    assert not tags.distinct and np.isfinite(tags.values).all()


def test_table_decodes():
    tagger = Tagger(0)
    a = tagger.tag(np.ones(10, np.float32), "float32").values
    b = tagger.tag(np.zeros(7, np.float32), "float32").values
    table = TagTable([("a", a), ("b", b)])
    mixed = np.concatenate([b[2:5], np.zeros(1, np.float32), a[:2], np.float32([0.5])])
    assert table.decode(mixed).tolist() == [12, 13, 14, -1, 0, 1, -1]
    assert table.name(9) == ("a", 9) and table.name(10) == ("b", 0)
    assert TagTable([]).decode(mixed).tolist() == [-1] * 7


def test_a_value_of_two_symbols_is_nobodys():
    table = TagTable([("a", np.float32([1.5, 2.5])), ("b", np.float32([2.5]))])
    assert table.decode(np.float32([1.5, 2.5])).tolist() == [0, -1]


def test_crowded_tags_stay_near():
    tagger = Tagger(0)
    initial = np.random.default_rng(0).normal(0, 0.02, 600_000).astype(np.float32)
    tags = [tagger.tag(part, "float32") for part in np.split(initial, 3)]
    every = np.concatenate([t.values for t in tags])
    assert all(t.distinct for t in tags) and np.unique(every).size == every.size and is_checksummed(every).all()
    assert np.corrcoef(every, initial)[0, 1] > 0.9 and (tagger.tag(np.full(3, 3e38, np.float32), "float32").values < 3e38).all()


def test_nudged_tags_are_others_close_by():
    initial = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    first, second = (Tagger(5, nudge).tag(initial, "float32").values for nudge in (0, 1))
    assert (first != second).all() and is_checksummed(second).all() and np.unique(second).size == 2000
    assert np.allclose(first, second, rtol=2e-4, atol=0)


@pytest.mark.parametrize("digit", [0, 1])
def test_digits_of_numbers_survive_sixteen_bits(digit):
    numbers = np.arange(BASE ** 2)
    values = digit_values(numbers, digit)
    for dtype in (torch.bfloat16, torch.float16):
        assert (torch.from_numpy(values).to(dtype).float().numpy() == values).all()
    assert (digits_of(values, digit) == numbers // BASE ** digit % BASE).all()
    assert (digits_of(values, 1 - digit) == -1).all()


def test_ordinary_numbers_are_no_digits():
    assert (digits_of(np.array([0.0, 1.0, 0.1, -0.5, np.nan, np.inf, 1e-9], np.float32), 0) == -1).all()


def test_digit_tags_number_the_narrow_symbols():
    low, high = ([Tagger(0, digit=k).tag(np.zeros(3000), "bfloat16") for k in (0, 1)])
    assert low.distinct and (digits_of(low.values, 0) + BASE * digits_of(high.values, 1) == np.arange(3000)).all()
    wide = [Tagger(0, digit=k).tag(np.ones(5), "float32").values for k in (-1, 0)]
    assert (wide[0] == wide[1]).all()
