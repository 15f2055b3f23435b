"""Canonical names: equal up to order and renaming gives equal names; different obligations never share them."""
import random
from fractions import Fraction

import numpy as np
import pytest

from trainverify.kernel import ANY, POSITIVE, Obligation, Proved, Terms, prove
from trainverify.kernel.rename import canonical, canonical_rows, distinct, instantiate, rename, template
from trainverify.kernel.terms import COMMUTATIVE, merged, pairs

from .expr import World
from .generate import term


def shuffled(ob, rng, names):
    """The obligation with operands in random order and other leaf numbers."""
    terms, new = Terms(), {}

    def go(i):
        if i not in new:
            kind, attr, args = ob.nodes[i]
            units = list(pairs(args)) if kind == "dot" else [(a,) for a in args]
            if kind in COMMUTATIVE:
                rng.shuffle(units)
                units = [tuple(rng.sample(u, len(u))) for u in units]
            new[i] = terms.add(kind, names[attr] if kind == "leaf" else attr, [go(a) for u in units for a in u])
        return new[i]

    given = [(go(i), s) for i, s in rng.sample(ob.given, len(ob.given))]
    rhs, lhs = go(ob.rhs), go(ob.lhs)
    return terms.obligation(lhs, rhs, given)


def with_names(ob, names):
    """The obligation with its leaves renamed."""
    terms, new = Terms(), {}
    for i, (kind, attr, args) in enumerate(ob.nodes):
        new[i] = terms.add(kind, names[attr] if kind == "leaf" else attr, [new[a] for a in args])
    return terms.obligation(new[ob.lhs], new[ob.rhs], [(new[i], s) for i, s in ob.given])


@pytest.mark.parametrize("seed", range(6))
def test_canonical(seed):
    rng = random.Random(seed)
    for _ in range(60):
        w = World()
        n = rng.randint(2, 6)
        x, y = (term(w, rng, n, 3, safe=False) for _ in range(2))
        ob = w.claim(x, y, [(w.leaf(f"x{k}"), rng.choice([POSITIVE, ANY])) for k in range(rng.randint(0, 2))])
        used = sorted({node.attr for node in merged(ob)[0].nodes if node.kind == "leaf"})
        names = dict(zip(used, rng.sample(range(70_000, 90_000), len(used)), strict=True))
        first, old = canonical(ob)
        second, old2 = canonical(shuffled(merged(ob)[0], rng, names))
        assert first == second
        assert sorted(old) == used and sorted(old2) == sorted(names.values())
        back = with_names(first, old)                          # the same claim: both sides are those of ob up to order
        both = w.claim(x, y, [(w.leaf(f"x{k}"), POSITIVE) for k in range(n)])
        nodes = (*both.nodes, *(node._replace(args=tuple(a + len(both.nodes) for a in node.args)) for node in back.nodes))
        for ours, theirs in ((both.lhs, back.lhs), (both.rhs, back.rhs)):
            assert prove(Obligation(nodes, ours, theirs + len(both.nodes))).how == "same"


def test_canonical_tells_apart():
    w = World()
    a, b, c, d = (w.leaf(n) for n in "abcd")
    claims = [w.claim(x, y) for x, y in [
        (a * b + c * d, a * c + b * d), (a * b + c * d, a * b + c * d), (a * b + c * d, a * b + c * c), (w.uf("f", a, b), w.uf("f", b, a)),
        (w.uf("f", a, b), w.uf("f", a, b)), (w.uf("g", a, b), w.uf("g", b, a)), (2 * a + b, a + b), (a + 2 * b, 2 * a + b)]]
    claims += [w.claim(a + b, a, [(a, POSITIVE)]), w.claim(a + b, a, [(b, POSITIVE)])]
    assert len({canonical(ob)[0] for ob in claims}) == len(claims)


def matmul(blocks, length):
    """A sum of products at once, and in blocks."""
    w = World()
    x, y, z = (w.leaves(n, length) for n in "xyz")
    u = w.leaves("u", length)
    step = length // blocks
    return w.claim(w.dot(x, y), w.sum([w.dot(z[k:k + step], u[k:k + step]) for k in range(0, length, step)]))


def rows_of(rng, n, length, blocks):
    """Rows whose identifiers make the obligation true, in any order of products and of factors."""
    rows = []
    for _ in range(n):
        ids = np.sort(rng.choice(10**12, (2 * length,), replace=False))
        x, y = ids[:length], ids[length:]
        order = np.arange(length)
        for block in np.split(order, blocks):
            rng.shuffle(block)
        flip = rng.random(length) < 0.5
        # positions are numbered by the order in which leaves were made: x, y, z, u
        rows.append(np.concatenate([x, y, np.where(flip, y, x)[order], np.where(flip, x, y)[order]]))
    return np.array(rows)


def test_rows_of_one_kind_get_one_name():
    rng = np.random.default_rng(0)
    t = template(matmul(2, 8))
    named = canonical_rows(t, rows_of(rng, 200, 8, 2))
    first, kinds = distinct(named.names)
    assert len(first) == 1 and not kinds.any()
    assert named.names.dtype == np.int64
    assert isinstance(prove(instantiate(t, named.names[0])), Proved)


def test_colours_decide_where_identifiers_say_nothing():
    """Whatever the identifiers are: a leaf is known by the other places that it occupies."""
    rng = np.random.default_rng(1)
    w = World()
    x, y, z = (w.leaves(n, 6) for n in "xyz")
    t = template(w.claim(w.dot(x, y), w.uf("f", *z)))
    rows = []
    for _ in range(100):
        ids = rng.choice(10**6, 12, replace=False)
        order = rng.permutation(6)
        rows.append(np.concatenate([ids[order], ids[6 + order], ids[:6]]))
    assert len(distinct(canonical_rows(t, np.array(rows)).names)[0]) == 1
    rows[7][12:14] = rows[7][13:11:-1]                         # still a permutation of the same kind
    rows[8][12] = rows[8][13]                                  # not: one leaf twice
    assert len(distinct(canonical_rows(t, np.array(rows)).names)[0]) == 2


def test_rows_keep_their_claim():
    """What is rearranged is an obligation with the same sides, up to order."""
    rng = random.Random(3)
    for _ in range(80):
        w = World()
        x, y = (term(w, rng, 3, 3, safe=False) for _ in range(2))
        form, count = positions(w.claim(x, y), w)
        t = template(form)
        rows = np.array([[rng.randrange(4) for _ in range(count)] for _ in range(5)], dtype=np.int64).reshape(5, count)
        named = canonical_rows(t, rows)
        for before, after, names in zip(rows, named.rows, named.names, strict=True):
            pairs_of_names = {(int(a), int(b)) for a, b in zip(after, names, strict=True)}
            assert len(pairs_of_names) == len({a for a, _ in pairs_of_names}) == len({b for _, b in pairs_of_names})
            old, new = instantiate(t, before), instantiate(t, after)
            n = len(old.nodes)
            nodes = (*old.nodes, *(node._replace(args=tuple(a + n for a in node.args)) for node in new.nodes))
            assert prove(Obligation(nodes, old.lhs, new.lhs + n)).how == "same"
            assert prove(Obligation(nodes, old.rhs, new.rhs + n)).how == "same"


def positions(ob, w):
    """The obligation as a tree, or with some shared nodes, in which each leaf node is a position."""
    terms, count = Terms(), 0
    shared = {}

    def go(i):
        nonlocal count
        kind, attr, args = ob.nodes[i]
        if kind == "leaf":
            count += 1
            return terms.add("leaf", count - 1)
        if i % 5 == 0:                                          # every fifth node is shared between its users
            if i not in shared:
                shared[i] = terms.add(kind, attr, [go(a) for a in args])
            return shared[i]
        return terms.add(kind, attr, [go(a) for a in args])

    lhs, rhs = go(ob.lhs), go(ob.rhs)
    return terms.obligation(lhs, rhs), count


def test_given_positions_stay():
    """A position with a hypothesis does not change places."""
    terms = Terms()
    a, b, c, d = (terms.add("leaf", k) for k in range(4))
    ob = terms.obligation(terms.add("add", None, [a, b]), terms.add("add", None, [c, d]), [(a, POSITIVE)])
    named = canonical_rows(template(ob), np.array([[9, 5, 9, 5], [5, 9, 9, 5], [9, 5, 5, 9]]))
    assert named.rows[:, :2].tolist() == [[9, 5], [5, 9], [9, 5]]
    assert len({tuple(row) for row in named.names.tolist()}) <= 2


def test_many_leaves():
    """More names than sixteen bits hold."""
    rows = np.concatenate([np.arange(70_000)[::-1], np.arange(70_000)])[None]
    names = rename(rows)
    assert names[0, :70_000].tolist() == list(range(70_000))
    assert names[0, 70_000:].tolist() == list(range(70_000))[::-1]
    assert rename(np.array([[2**62, 5, 2**62, 7, 5]])).tolist() == [[0, 1, 0, 2, 1]]


def test_empty_rows():
    w = World()
    t = template(w.claim(w.lift(Fraction(2)), w.lift(1) + 1))
    named = canonical_rows(t, np.zeros((3, 0), np.int64))
    assert named.names.shape == (3, 0) and distinct(named.names)[0].tolist() == [0]
    assert isinstance(prove(instantiate(t, named.names[0])), Proved)


def test_distinct_rows():
    first, kinds = distinct(np.array([[0, 1], [0, 0], [0, 1], [0, 0], [1, 0]]))
    assert sorted(first.tolist()) == [0, 1, 4] and (first[kinds] == [0, 1, 0, 1, 4]).all()


def test_a_template_needs_its_positions():
    terms = Terms()
    a, b = terms.add("leaf", 0), terms.add("leaf", 2)
    with pytest.raises(ValueError, match="one leaf node"):
        template(terms.obligation(a, b))
