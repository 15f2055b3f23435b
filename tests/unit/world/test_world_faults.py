"""Each way in which a world can fail, and what is said about it: code, ranks, line, and what the others were doing."""
import os
import signal
import sys
import time

import pytest
import torch
from trainverify.capture import world
from trainverify.capture.faults import FAULTS
from trainverify.capture.userframes import frames_of_stack_dump
from trainverify.capture.wire import Signature
from trainverify.capture.world import run_world
from trainverify.diagnostics import Diagnostic, Fault, Span

LIMIT = 60.0


def here(op, **fields):
    """A signature at the caller's line."""
    frame = sys._getframe(1)
    return Signature(op, span=Span(__file__, frame.f_lineno, frame.f_code.co_name), group_name="dp", **fields)


def line_of(function, text):
    """The number of the line in a function that contains a text."""
    import inspect
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, source in enumerate(lines) if text in source)


def faults(n, child, limit=LIMIT):
    return run_world(n, child, timeout=limit).faults


def only(found):
    assert len(found) == 1, found
    return found[0]


def test_every_code_has_a_title():
    assert all(code.startswith("RUN") and title for code, title in FAULTS.items())


def test_no_fault():
    def child(rank):
        values = rank.channel.exchange((0, 1), 1, here("all_reduce"), [torch.full((2,), float(rank.rank))])
        return str([v[0].tolist() for v in values]).encode()
    world = run_world(2, child, timeout=LIMIT)
    assert not world.faults
    assert world.results == [b"[[0.0, 0.0], [1.0, 1.0]]"] * 2


def test_deadlock_of_receives():
    def child(rank):
        rank.channel.recv(1 - rank.rank, ("dp", 0), here("recv"))
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks, fault.severity) == ("RUN001", (0, 1), "error")
    assert fault.span.line == line_of(child, "channel.recv")
    assert "rank 0 waits for rank 1, rank 1 waits for rank 0" in fault.message
    assert any("rank 1 waits at" in n and "to receive from rank 0" in n for n in fault.notes)
    assert any("receives before it sends" in n for n in fault.notes)


def test_a_receive_with_another_tag_than_the_send():
    def child(rank):
        if rank.rank == 0:
            rank.channel.send(1, ("dp", 5), [torch.zeros(1)], here("send"))
        rank.channel.recv(1 - rank.rank, ("dp", 3), here("recv"))
    fault = only(faults(2, child))
    assert fault.code == "RUN001"
    assert any("rank 0 did send to rank 1, but with tag dp/5" in n for n in fault.notes)


def test_collectives_of_overlapping_groups_in_different_order():
    def child(rank):
        if rank.rank == 0:
            rank.channel.exchange((0, 1), 1, here("all_reduce"), [])
        rank.channel.exchange((0, 1, 2), 1, here("broadcast"), [])
    fault = only(faults(3, child))
    assert (fault.code, fault.ranks) == ("RUN001", (0, 1))
    assert any("different order" in n for n in fault.notes)


def test_groups_with_the_same_members_that_are_not_the_same():
    def child(rank):
        name = "1" if rank.rank == 0 else "2"
        rank.channel.exchange((0, 1), 1, Signature("all_reduce", group_name=name), [])
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks) == ("RUN007", (0, 1))


def test_ranks_that_disagree_about_the_members():
    def child(rank):
        group = (0, 1) if rank.rank else (0, 1, 2)
        if rank.rank < 2:
            rank.channel.exchange(group, 1, here("all_reduce"), [])
        else:
            rank.channel.exchange((0, 1, 2), 1, here("barrier"), None)
    assert [f.code for f in faults(3, child)] == ["RUN002"]    # ranks 0 and 2 meet with different operations

    def pair(rank):
        rank.channel.exchange((0, 1) if rank.rank else (0, 1, 2), 1, here("all_reduce"), [])
    fault = only(faults(3, lambda rank: pair(rank) if rank.rank < 2 else rank.channel.recv(0, 0)))
    assert fault.code == "RUN007"


@pytest.mark.parametrize(("code", "usual", "odd"), [
    ("RUN002", dict(op="all_reduce"), dict(op="broadcast")),
    ("RUN003", dict(op="all_reduce", reduce_op="sum"), dict(op="all_reduce", reduce_op="avg")),
    ("RUN004", dict(op="all_reduce", dtypes=("float32",)), dict(op="all_reduce", dtypes=("bfloat16",))),
    ("RUN005", dict(op="all_reduce", sizes=((2, 3),)), dict(op="all_reduce", sizes=((2, 4),))),
    ("RUN006", dict(op="broadcast", root=0), dict(op="broadcast", root=1)),
])
def test_mismatched_collective_names_the_odd_one(code, usual, odd):
    def child(rank):
        fields = dict(odd if rank.rank == 2 else usual)
        op = fields.pop("op")
        if rank.rank == 2:
            rank.channel.exchange((0, 1, 2, 3), 1, here(op, **fields), [])       # odd
        else:
            rank.channel.exchange((0, 1, 2, 3), 1, here(op, **fields), [])       # usual
    fault = only(faults(4, child))
    assert (fault.code, fault.ranks, fault.span.line) == (code, (2,), line_of(child, "# odd"))
    assert "rank 2 calls" in fault.message and "ranks 0, 1, 3 call" in fault.message
    usual_line = line_of(child, "# usual")
    assert [n for n in fault.notes if n.startswith("rank 0: ") and n.endswith(f":{usual_line}")]
    assert any("call 1 of group 'dp' (ranks 0-3)" in n for n in fault.notes)
    assert fault.fix


def test_equal_counts_in_other_shapes_meet():
    def child(rank):
        rank.channel.exchange((0, 1), 1, here("all_reduce", sizes=((2, 3) if rank.rank else (6,),)), [])
    assert not faults(2, child)


def test_two_ranks_without_a_majority():
    def child(rank):
        rank.channel.exchange((0, 1), 1, here("all_reduce", sizes=((2 + rank.rank,),), dtypes=("float32",)), [])
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks) == ("RUN005", (0, 1))
    assert "float32 [2]" in fault.message and "float32 [3]" in fault.message


def test_the_last_call_on_which_all_agreed_is_told():
    def child(rank):
        rank.channel.exchange((0, 1), 1, here("all_gather"), [])         # agreed
        rank.channel.exchange((0, 1), 2, here("all_reduce" if rank.rank else "broadcast"), [])
    fault = only(faults(2, child))
    assert any(f"the call before was all_gather at {__file__}:{line_of(child, '# agreed')}" in n for n in fault.notes)


def test_split_sizes_that_do_not_fit():
    def child(rank):
        ins, outs = ((3, 1), (3, 2)) if rank.rank == 0 else ((2, 2), (4, 2))
        rank.channel.exchange((0, 1), 1, here("all_to_all", in_splits=ins, out_splits=outs), [])
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks) == ("RUN005", (0, 1))
    assert "rank 0 sends 1 elements to rank 1, which expects 4" in fault.message


def test_split_sizes_that_fit():
    def child(rank):
        ins, outs = ((3, 1), (3, 2)) if rank.rank == 0 else ((2, 2), (1, 2))
        rank.channel.exchange((0, 1), 1, here("all_to_all", in_splits=ins, out_splits=outs), [])
    assert not faults(2, child)


def test_a_mismatch_is_seen_though_not_all_members_came():
    def child(rank):
        if rank.rank < 2:
            rank.channel.exchange((0, 1, 2), 1, here("all_reduce" if rank.rank else "barrier"), None)
        else:
            rank.channel.recv(0, 0, here("recv"))
    assert faults(3, child)[0].code == "RUN002"


def test_a_peer_that_has_finished():
    def child(rank):
        for seq in range(1, 3 if rank.rank == 1 else 4):
            rank.channel.exchange((0, 1, 2), seq, here("all_reduce"), [])
    fault = only(faults(3, child))
    assert (fault.code, fault.ranks) == ("RUN008", (1,))
    assert "rank 1 has finished while ranks 0, 2 wait in all_reduce" in fault.message
    assert fault.span.line == line_of(child, "all_reduce")
    assert any("rank 1 made 2 calls; rank 0 waits in call 3" in n for n in fault.notes)


def test_a_sender_that_has_finished():
    def child(rank):
        if rank.rank == 0:
            rank.channel.recv(1, 0, here("recv"))
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks) == ("RUN008", (1,))
    assert fault.span.line == line_of(child, "channel.recv")


def user_code(rank):
    if rank.rank == 1:
        return torch.zeros(3) + torch.zeros(4)
    return rank.channel.exchange((0, 1, 2), 1, here("all_reduce"), [])


def test_a_rank_that_raises():
    fault = only(faults(3, lambda rank: user_code(rank) and None))
    assert (fault.code, fault.ranks, fault.severity) == ("RUN009", (1,), "error")
    assert "rank 1 raised RuntimeError: The size of tensor a (3)" in fault.message
    assert (fault.span.file, fault.span.line, fault.span.phase) == (__file__, line_of(user_code, "torch.zeros(4)"), "")
    assert not any("site-packages/torch" in n or "world.py" in n for n in fault.notes)
    assert any("rank 2 waits in all_reduce" in n and "for rank 1" in n for n in fault.notes)


def test_ranks_that_raise_alike_are_one_fault():
    def child(rank):
        raise ValueError("no such configuration")
    fault = only(faults(3, child))
    assert (fault.code, fault.ranks) == ("RUN009", (0, 1, 2))


def test_an_exception_that_says_nothing_is_told_by_its_place():
    """Where it was raised, in whatever library, though the fault names the program's own line."""
    def silent(rank):
        import contextlib
        contextlib.ExitStack().enter_context(Silent())

    class Silent:
        def __enter__(self):
            raise AssertionError

        def __exit__(self, *exc):
            return None

    notes = only(faults(1, silent)).notes
    assert any(n.startswith("raised at ") and n.endswith("in __enter__: raise AssertionError") for n in notes), notes


def test_sys_exit_is_a_fault():
    assert only(faults(1, lambda rank: sys.exit(3))).code == "RUN009"


def test_a_diagnostic_of_capture_passes_through():
    def child(rank):
        raise Fault(Diagnostic("CAP123", "cannot be captured", severity="internal"))
    fault = only(faults(2, child))
    assert (fault.code, fault.severity, fault.ranks) == ("CAP123", "internal", (0, 1))


def test_our_own_bug_is_internal():
    def child(rank):
        rank.channel.send(0, 0, ["no tensor"])
    fault = only(faults(1, child))
    assert (fault.code, fault.severity) == ("RUN015", "internal")
    assert any("wire.py" in n for n in fault.notes)


@pytest.mark.parametrize(("ends", "text"), [
    (lambda: os.kill(os.getpid(), signal.SIGSEGV), "rank 1 was killed by SIGSEGV"),
    (lambda: os._exit(7), "rank 1 exited with code 7"),
])
def test_a_rank_that_dies(ends, text):
    def child(rank):
        rank.channel.exchange((0, 1), 1, here("barrier"), None)          # last
        if rank.rank == 1:
            print("last words", flush=True)
            ends()
        rank.channel.exchange((0, 1), 2, here("all_reduce"), [])
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks, fault.message) == ("RUN010", (1,), text)
    assert fault.span.line == line_of(child, "# last")
    assert "output: last words" in fault.notes
    assert any("rank 0 waits in all_reduce" in n for n in fault.notes)


def test_wall_clock_limit_tells_what_each_rank_does():
    def child(rank):
        if rank.rank == 1:
            while True:
                time.sleep(0.01)                                          # busy
        rank.channel.exchange((0, 1), 1, here("all_reduce"), [])
    fault = only(faults(2, child, limit=1.0))
    assert (fault.code, fault.ranks) == ("RUN011", (1,))
    assert fault.span.line in (line_of(child, "# busy"), line_of(child, "while True"))
    assert any("rank 1 was executing" in n and "in child" in n for n in fault.notes)
    assert any("rank 0 waits in all_reduce" in n for n in fault.notes)


def test_what_started_us_is_no_code_of_a_rank():
    frames = [("/home/u/train.py", 7, "step"), (world.__file__, 3, "_run_child"), (world.__file__, 2, "start"), ("/home/u/.venv/bin/trainverify", 8, "<module>")]
    dump = "Current thread 0x1 (most recent call first):\n" + "".join(f'  File "{file}", line {line} in {name}\n' for file, line, name in frames)
    assert frames_of_stack_dump(dump) == [("/home/u/train.py", 7, "step")]


def test_a_message_that_nobody_receives_is_a_warning():
    def child(rank):
        if rank.rank == 0:
            rank.channel.send(1, ("dp", 3), [torch.zeros(2, 3)], here("send"))
        return b"done"
    world = run_world(2, child, timeout=LIMIT)
    fault = only(world.faults)
    assert (fault.code, fault.severity, fault.ranks) == ("RUN012", "warning", (0, 1))
    assert fault.span.line == line_of(child, "channel.send")
    assert world.results == [b"done", b"done"]


@pytest.mark.parametrize("expects", [dict(sizes=((4,),), dtypes=("float32",)), dict(sizes=((3,),), dtypes=("float64",))])
def test_a_message_of_another_kind_than_expected(expects):
    def child(rank):
        if rank.rank == 0:
            rank.channel.send(1, 0, [torch.zeros(3)], here("send"))
        else:
            rank.channel.recv(0, 0, here("recv", **expects))
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks) == ("RUN013", (0, 1))
    assert "rank 0 sends float32 [3] to rank 1, which expects" in fault.message
    assert fault.span.line == line_of(child, "channel.recv")
    assert any(f":{line_of(child, 'channel.send')}" in n for n in fault.notes)


def test_a_collective_that_was_started_by_some_only():
    def child(rank):
        if rank.rank == 0:
            rank.channel.post((0, 1), 1, here("all_reduce"), [torch.zeros(1)])
    fault = only(faults(2, child))
    assert (fault.code, fault.ranks) == ("RUN014", (1,))
    assert fault.span.line == line_of(child, "channel.post")


def test_async_calls_may_be_posted_in_any_order():
    def child(rank):
        a = rank.channel.post((0, 1), 1 + rank.rank, here("all_reduce"), [torch.full((1,), 1.0 + rank.rank)])
        b = rank.channel.post((0, 1), 2 - rank.rank, here("all_reduce"), [torch.full((1,), 1.0 + rank.rank)])
        return bytes(int(sum(v[0].item() for v in rank.channel.complete(t))) for t in (b, a))
    world = run_world(2, child, timeout=LIMIT)
    assert not world.faults and world.results == [b"\3\3", b"\3\3"]


def test_an_unfinished_async_call_and_a_message_do_not_deadlock():
    def child(rank):
        if rank.rank == 0:
            ticket = rank.channel.post((0, 1), 1, here("all_reduce"), [])
            rank.channel.send(1, 0, [torch.ones(1)])
        else:
            rank.channel.recv(0, 0)
            ticket = rank.channel.post((0, 1), 1, here("all_reduce"), [])
        rank.channel.complete(ticket)
    assert not faults(2, child)
