"""Index spaces: facts are refined until they agree, and what is kept is a restriction."""
import random

import numpy as np
import pytest

from trainverify.shrink.spaces import ONE, Conflict, Kept, Spaces


def kept_of(s: Spaces, counts: dict[int, int]) -> Kept:
    """The first `counts[atom]` indices of each atom (all where nothing is said)."""
    return Kept(s, {a: np.arange(counts.get(a, s.size(a))) for a in s.roots() if s.form(a) is None})


def test_two_factorisations_are_refined():
    s = Spaces()
    whole, a, b, c, d = (s.new(n) for n in (24, 4, 6, 2, 12))
    s.product(whole, (a, b))
    s.product(whole, (c, d))
    assert sorted(s.size(x) for x in s.atoms(whole)) == [2, 2, 6]
    assert s.find(c) in s.atoms(a) and s.find(b) in s.atoms(d)
    assert not s.pins


def test_factorisations_without_a_common_refinement_are_pinned():
    s = Spaces()
    whole = s.new(6)
    s.product(whole, (s.new(2), s.new(3)))
    s.product(whole, (s.new(3), s.new(2)))
    assert {s.size(p.space) for p in s.pins} == {2, 3}


def test_uneven_shards_of_a_padded_buffer():
    """20 elements on three ranks: 7, 7 and 6, padded to 21. The reduced sizes keep the last shard shorter."""
    s = Spaces()
    buffer, ranks, shard, hidden = s.new(21), s.new(3), s.new(7), s.new(20)
    s.product(buffer, (ranks, shard))
    s.unify(s.segment(buffer, 0, 20), hidden)
    inner, last = s.flat(shard)
    assert (s.size(inner), s.size(last)) == (6, 1)
    k = kept_of(s, {s.find(inner): 4})
    assert (k.count(hidden), k.count(buffer), k.count(shard)) == (14, 15, 5)
    assert k.indices(hidden).tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 13, 14, 15, 16, 17]


def test_a_shift_leaves_nothing_to_reduce():
    """x[:-1] against x[1:]: index i is index i + 1."""
    s = Spaces()
    x = s.new(9)
    s.unify(s.segment(x, 0, 8), s.segment(x, 1, 9))
    s.close()
    assert {s.size(a) for a in s.atoms(x)} == {1}


def test_equal_structures_are_one_class():
    s = Spaces()
    a, b = s.new(3), s.new(5)
    x, y = s.new(15), s.new(15)
    s.product(x, (a, b))
    s.product(y, (a, b))
    assert s.find(x) != s.find(y)
    s.close()
    assert s.find(x) == s.find(y)


def test_sizes_that_differ_conflict():
    s = Spaces()
    with pytest.raises(Conflict):
        s.unify(s.new(3), s.new(4))
    with pytest.raises(Conflict):
        s.product(s.new(12), (s.new(3), s.new(5)))


def test_a_part_that_ends_inside_a_row_of_many_pins():
    s = Spaces()
    x = s.new(100 * 7)
    s.product(x, (s.new(100), s.new(7)))
    s.segment(x, 3, 250)
    assert any("inside a row" in p.why for p in s.pins)


def _random_facts(rng: random.Random) -> tuple[Spaces, int]:
    s = Spaces()
    x = s.new(rng.choice([24, 36, 48, 60]))
    for _ in range(4):
        n = s.size(x)
        if rng.random() < 0.5:
            first = rng.choice([d for d in range(2, n) if n % d == 0])
            s.product(x, (s.new(first), s.new(n // first)))
        else:
            lo = rng.randrange(n - 1)
            s.segment(x, lo, rng.randrange(lo + 1, n + 1))
    s.close()
    return s, x


@pytest.mark.parametrize("seed", range(60))
def test_counts_positions_and_indices_agree(seed):
    rng = random.Random(seed)
    s, x = _random_facts(rng)
    pinned = {a for p in s.pins for a in s.atoms(p.space)}
    k = kept_of(s, {a: rng.randrange(1, s.size(a) + 1) for a in s.roots() if s.form(a) is None and a != ONE and a not in pinned})
    for r in s.roots():
        mine = k.indices(r)
        assert len(mine) == k.count(r) and (np.diff(mine) > 0).all() and (len(mine) == 0 or mine[-1] < s.size(r))
        assert all(k.before(r, at) == int((mine < at).sum()) for at in range(s.size(r) + 1))
