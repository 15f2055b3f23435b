"""Files for obligations that are not decided."""
from fractions import Fraction

import pytest
from kernel.expr import World

from trainverify.certify.dump import Item, dump_unknown
from trainverify.certify.formula import formula
from trainverify.certify.smtlib import script
from trainverify.certify.solvers import load
from trainverify.diagnostics import Fault
from trainverify.kernel import NONZERO, POSITIVE
from trainverify.kernel.terms import digest

READABLE = """\
obligation DIGEST
theory     division, exp
SMT-LIB    in part: a solver's unsat proves the claim, its sat means nothing
at         train.py:31: definedness
at         train.py:44: budget

For all reals x<k> for which the left side is defined and what is given holds, the right side is defined and equal:

t4 = exp(x0) * 1/x1
given x1 > 0
t4 == 1/2 * t4

The same, node by node (the address is of this form):

n0 = leaf<0>()
n1 = exp(n0)
n2 = leaf<1>()
n3 = inv(n2)
n4 = mul(n1 n3)
n5 = scl<1/2>(n4)
given n2 > 0
n4 == n5
"""


def example():
    w = World()
    x = w.exp(w.leaf("x")) / w.leaf("y", POSITIVE)
    return w.claim(x, x * Fraction(1, 2))


def test_files(tmp_path):
    ob, w = example(), World()
    other = w.claim(w.leaf("x"), w.leaf("x") + w.leaf("y"))
    first = Item(ob, "train.py:31", "definedness")
    items = [first, Item(other, "train.py:40", "budget"), Item(ob, "train.py:44", "budget"), first]
    written = dump_unknown(tmp_path / "new" / "folder", items)
    assert [p.name for p in written] == [digest(o) + suffix for o in (ob, other) for suffix in (".txt", ".smt2")]
    assert sorted(written) == sorted((tmp_path / "new" / "folder").iterdir())
    assert written[0].read_text() == READABLE.replace("DIGEST", digest(ob))
    assert written[1].read_text() == script(ob, [f"obligation {digest(ob)}: unsat proves it", "train.py:31: definedness", "train.py:44: budget",
                                                 "some functions are abstracted: sat means nothing"])
    assert "sat means nothing" not in written[3].read_text()
    assert load("z3").run(written[3].read_text(), 10_000).status == "sat"


def test_formula():
    w = World()
    x, y, long = w.leaf("x"), w.leaf("y"), w.sum([w.leaf(f"long{k}") for k in range(20)])
    both = x + y
    left = w.dot([x, both], [-y, x - 2 * y]) * w.inv(both * y) + w.compare("ge", x, y - Fraction(1, 3)) * (-x)
    right = w.apply("pow", both, attr=Fraction(-1, 2)) * x**2 - w.max([x, w.exp(long)]) + w.uf("silu'", x, -both) * Fraction(-2, 3)
    lines = formula(w.claim(left, right, [(w.sqrt(y), NONZERO)])).splitlines()
    sums = " + ".join(f"x{k}" for k in range(2, 22))
    assert lines == [
        f"t22 = {sums}",
        "t23 = x0 + x1",
        "given sqrt(x1) != 0",
        "(x0 * (-x1) + t23 * (x0 - 2 * x1)) * 1/(t23 * x1) + [x0 >= x1 - 1/3] * (-x0) == "
        "t23^(-1/2) * x0^2 - max(x0, exp(t22)) - 2/3 * silu'(x0, -t23)",
    ]


def test_places_of_several_lines_stay_comments(tmp_path):
    w = World()
    _, file = dump_unknown(tmp_path, [Item(w.claim(w.leaf("x"), w.leaf("x")), "a.py:1\n(assert false)", "why")])
    assert "; (assert false)" in file.read_text() and "\n(assert false)" not in file.read_text()


def test_writing_again_gives_the_same_files(tmp_path):
    first = {p: p.read_bytes() for p in dump_unknown(tmp_path, [Item(example(), "a.py:1", "budget")])}
    assert first == {p: p.read_bytes() for p in dump_unknown(tmp_path, [Item(example(), "a.py:1", "budget")])}


def test_nothing_to_dump(tmp_path):
    assert dump_unknown(tmp_path, []) == [] and list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault) as fault:
        dump_unknown(tmp_path / "file", [Item(example(), "a.py:1", "budget")])
    assert fault.value.diagnostics[0].code == "FILE006"
    assert str(tmp_path / "file") in fault.value.diagnostics[0].message
