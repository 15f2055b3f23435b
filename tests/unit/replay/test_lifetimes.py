"""Replay lets go of a storage only after the last call that names it, in whatever way."""
from trainverify.ir.trace import Collective, Name, OpCall, Sequence, TensorRef, Trace
from trainverify.replay.lifetimes import last_uses


def ref(storage):
    return TensorRef(storage, 0, (2,), (1,), "float32")


def trace(*calls):
    return Trace("reference", 0, 1, list(calls), [], [], [])


def collective(kind, inputs, outputs, work):
    return Collective(kind, (0, 1), "g", 0, inputs, outputs, work=work)


def test_every_way_of_using_a_storage_counts():
    calls = [OpCall(0, "aten.add.Tensor", (ref(0), ref(1)), {"alpha": 1}, ref(2), ()),
             OpCall(1, "aten.cat.default", (Sequence((ref(0), ref(2))),), {"out": ref(3)}, ref(3), (ref(3),)),
             OpCall(2, "aten.zero_.default", (ref(4),), {}, ref(4), (ref(4),)),
             OpCall(3, "tv.resize", (Name("storage", "4"), 0), {}, None, ())]
    assert {i: set(s) for i, s in last_uses(trace(*calls)).items()} == {0: {1}, 1: {0, 2, 3}, 3: {4}}


def test_what_is_received_is_used_until_the_wait():
    calls = [OpCall(0, "c10d.recv_.default", (ref(5),), {}, None, (), collective=collective("recv", (), (ref(5),), 7)),
             OpCall(1, "aten.relu.default", (ref(6),), {}, ref(8), ()),
             OpCall(2, "tv.wait", (7,), {}, None, ())]
    assert {i: set(s) for i, s in last_uses(trace(*calls)).items()} == {1: {6, 8}, 2: {5}}
