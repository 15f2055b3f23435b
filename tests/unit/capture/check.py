"""Is a captured program what was executed? Replays it natively and compares the digests of every call."""
from trainverify.capture.digest import clear, crc
from trainverify.ir.trace import Program
from trainverify.ops.access import makes_garbage, reads
from trainverify.ops.standard import standard_table
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay


def replayed(program: Program) -> World:
    """The replayed program, after every call read and wrote, bit for bit, what it did when it was captured."""
    wrong = []

    def before(machine, call):
        if crc(machine.native.tensor(r) for r in reads(call)) != call.digest_in:
            wrong.append((machine.rank, call.index, call.name, "reads", str(machine.span(call))))

    def after(machine, call, results):
        if call.name.startswith("aten.") and makes_garbage(call.name) and not call.rng:
            for t in results:
                clear(t.untyped_storage())
        elif call.digest_out and crc(machine.native.tensor(r) for r in call.targets()) != call.digest_out:
            wrong.append((machine.rank, call.index, call.name, "writes", str(machine.span(call))))

    world = replay(program, [], standard_table(), Hooks(before=(before,), after=(after,)))
    assert not wrong, wrong[:5]
    return world
