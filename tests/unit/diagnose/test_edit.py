"""Edited programs: calls stand where the edit puts them, and all else is as it was."""
from fractions import Fraction

import pytest

from trainverify.diagnose.dataflow import Dataflow
from trainverify.diagnose.edit import Edit, all_reduce, applied, copied, regrouped, scaled, sent_to
from trainverify.diagnose.places import Places
from trainverify.diagnose.words import names_of
from trainverify.diagnostics import Span
from trainverify.ir.trace import Collective, Group, OpCall, Program, ScalarRef, TensorRef, Trace

X, Y = (TensorRef(i, 0, (3,), (1,), "float32") for i in range(2))


def op(index, name="aten.mul.Tensor", args=(X, X), outs=Y, span=0, **kw):
    return OpCall(index, name, args, {}, outs, span=span, digest_in=7, digest_out=8, **kw)


def message(index, kind, peer, seq):
    return op(index, f"c10d.{kind}.default", (), None, collective=Collective(kind, (0, 1), "0", seq, (X,), (X,), peer=peer))


def program(*ops, ranks=1, groups=(), spans=(Span("a.py", 1, "f"),), blobs=None):
    return Program([Trace("parallel", r, ranks, list(ops), spans=list(spans), groups=list(groups)) for r in range(ranks)], [blobs or {} for _ in range(ranks)])


def test_calls_are_numbered_anew_with_their_random_numbers():
    old = program(op(0), op(1, "aten.rand.default", rng=True), op(2), blobs={"rng.1.0": b"r", "init.0": b"i"})
    edit = Edit({(0, 2): None})
    edit.after[(0, 0)] += scaled(Y, Fraction(2, 3), 0)
    new = applied(old, edit)
    assert [(c.index, c.name, c.args) for c in new.traces[0].ops] == [
        (0, "aten.mul.Tensor", (X, X)), (1, "aten.mul_.Scalar", (Y, 2)), (2, "aten.div_.Scalar", (Y, 3)), (3, "aten.rand.default", (X, X))]
    assert new.blobs[0] == {"rng.3.0": b"r", "init.0": b"i"}
    assert [c.index for c in old.traces[0].ops] == [0, 1, 2] and old.traces[0].ops[0].digest_in == 7


@pytest.mark.parametrize(("call", "kept"), [
    (op(0), 0), (op(0, "aten._local_scalar_dense.default", (X,), 5), 7), (op(0, "aten._local_scalar_dense.default", (X,), ScalarRef(0)), 0), (op(0, "tv.escape", (X,), None), 7)])
def test_checksums_stay_where_plain_values_left_for_python(call, kept):
    (new,) = applied(program(call), Edit()).traces[0].ops
    assert (new.digest_in, new.digest_out) == (kept, 0)


def test_messages_are_counted_anew_where_peers_change():
    old = program(message(0, "send", 1, 0), message(1, "send", 2, 0), message(2, "recv", 2, 0), ranks=1)
    new = applied(old, Edit({(0, 1): sent_to(old.traces[0].ops[1], 1)}))
    assert [(c.collective.peer, c.collective.seq) for c in new.traces[0].ops] == [(1, 0), (1, 1), (2, 0)]


def test_a_collective_that_is_taken_out_copies_unless_it_was_in_place():
    there = Collective("all_reduce", (0, 1), "0", 3, (X,), (Y,), "sum")
    assert copied(op(0, collective=there)).args == (Y, X)
    assert copied(all_reduce(X, (0, 1), "sum", 1, 0)) is None
    other = regrouped(op(0, collective=there), (0, 2), 5).collective
    assert (other.group, other.seq, other.group_name != "0") == ((0, 2), 5, True)


def test_edits_of_the_same_call_exclude_each_other():
    assert Edit({(0, 1): None}).joined(Edit({(0, 1): op(1)})) is None
    assert Edit({(0, 1): None}).joined(Edit({(0, 2): None})).calls.keys() == {(0, 1), (0, 2)}


GROUPS = [Group("0", (0, 1, 2, 3)), Group("1", (0, 1), "tp"), Group("2", (2, 3), "tp"), Group("3", (0, 2)), Group("4", (1, 3))]


def test_groups_divide_the_ranks():
    p = program(op(0), ranks=4, groups=GROUPS)
    places = Places(Dataflow(p), names_of(p))
    assert {tuple(sorted(set(f.values()))) for f in places.families()} == {((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))}
    assert [places.over(places.family(g)) for g in ((2, 3), (0, 2), (0, 1, 2, 3))] == ["tp", "ranks [0, 2] and ranks [1, 3]", "all ranks"]


def test_calls_of_one_line_are_told_apart_by_who_called_and_how_often():
    spans = [Span("kit.py", 1, "f", step=1, stack=(("a.py", 5, "g"),)), Span("kit.py", 1, "f", step=1, stack=(("a.py", 9, "g"),)),
             Span("kit.py", 1, "f", step=2, stack=(("a.py", 5, "g"),))]
    p = program(op(0), op(1), op(2, span=1), op(3, span=2), op(4, span=2), ranks=2, spans=spans)
    places = Places(Dataflow(p), names_of(p))
    assert places.occurrences([(0, 1)], True) == [{0: (0, 1), 1: (1, 1)}, {0: (0, 4), 1: (1, 4)}]
    assert len(places.occurrences([(0, 1)], False)) == 4 and len(places.alike((0, 0))) == 10
    assert places.called((0, 0)) == " called at a.py:5"
