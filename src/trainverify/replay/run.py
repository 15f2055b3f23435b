"""The lock-step loop: every rank runs until it must meet others; collectives and messages are delivered when all have come (trusted)."""
from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from trainverify.algebra.base import Algebra
from trainverify.ir.trace import OpCall, Program, ScalarRef, Sequence, TensorRef, resized
from trainverify.ops.access import reads
from trainverify.ops.table import OpTable
from trainverify.replay.collectives import Tensors, deliver, message
from trainverify.replay.errors import ReplayError
from trainverify.replay.machine import Hooks, Machine, Recorded
from trainverify.replay.memory import is_float

NATIVE = Tensors()


@dataclass(slots=True)
class Rendezvous:
    """Members that have arrived at one collective, with copies of their inputs per algebra ("native" included), and what each gets."""

    calls: dict[int, OpCall] = field(default_factory=dict)
    ins: dict[int, dict[str, list]] = field(default_factory=dict)
    results: dict[int, dict[str, list]] = field(default_factory=dict)


class World:
    """All machines of one program and what is in flight between them."""

    def __init__(self, program: Program, algebras: list[Algebra], table: OpTable, hooks: Hooks):
        self.machines = [Machine(t, b, algebras, table, hooks) for t, b in zip(program.traces, program.blobs)]
        self.by_rank = {m.rank: m for m in self.machines}
        self.algebras = algebras
        self.meetings: dict[tuple, Rendezvous] = defaultdict(Rendezvous)
        self.issued: dict[tuple[int, int], OpCall] = {}      # (rank, work): to be completed at its wait
        self.mail: dict[tuple, dict[str, list]] = {}

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        live = deque(self.machines)
        total = sum(len(m.trace.ops) for m in self.machines) or 1
        idle, last = 0, 0
        while live:
            machine = live.popleft()
            before = machine.pc
            self._advance(machine)
            if machine.pc < len(machine.trace.ops):
                live.append(machine)
                idle = idle + 1 if machine.pc == before else 0
                if idle > len(live):
                    raise ReplayError("replay is stuck: " + "; ".join(f"rank {m.rank} at {m.trace.ops[m.pc].name}" for m in live))
            else:
                idle = 0
            done = sum(m.pc for m in self.machines)
            if progress and done - last > total // 50:
                last = done
                progress(done / total)

    def _advance(self, machine: Machine) -> None:
        ops = machine.trace.ops
        while machine.pc < len(ops):
            call = ops[machine.pc]
            if call.collective is not None:
                if not self._collective(machine, call):
                    return
            elif call.name.startswith("tv.") and not call.name.startswith("tv.scalar."):
                if not PSEUDO[call.name](self, machine, call):
                    return
            else:
                machine.execute(call)
            machine.release()
            machine.ops += 1
            machine.pc += 1

    # ---- collectives
    def _collective(self, machine: Machine, call: OpCall) -> bool:
        c = call.collective
        if machine.pending:
            machine._check_pending(call)
        if c.kind == "send":
            self.mail[message(machine.rank, c)] = self._send(machine, call)
            return True
        if c.kind != "recv":
            meeting = self.meetings[(c.group, c.group_name, c.seq)]
            if machine.rank not in meeting.calls:
                meeting.calls[machine.rank] = call
                meeting.ins[machine.rank] = self._send(machine, call)
        if c.work is None:
            return self._complete(machine, call)
        machine.pending[c.work] = self.issued[(machine.rank, c.work)] = call
        return True

    def _complete(self, machine: Machine, call: OpCall) -> bool:
        """Write what a collective or message delivers on this rank; False while others have not come."""
        c = call.collective
        if c.kind == "send":
            return True
        if c.kind == "recv":
            return self._receive(machine, call)
        key = (c.group, c.group_name, c.seq)
        meeting = self.meetings[key]
        if len(meeting.calls) < len(c.group):
            return False
        if not meeting.results:
            self._meet(meeting, c.group)
        results = meeting.results.pop(machine.rank)
        if not meeting.results:
            del self.meetings[key]
        self._write_native(machine, call, results["native"])
        for m in self.algebras:
            self._write(machine, m, call, results.get(m.name) or results["native"])
        for hook in machine.hooks.after:
            hook(machine, call, [])
        return True

    def _send(self, machine: Machine, call: OpCall) -> dict[str, list]:
        for hook in machine.hooks.before:
            hook(machine, call)
        machine.look_at_bytes(call, call.collective.inputs)
        return self._copies(machine, call.collective.inputs)

    def _copies(self, machine: Machine, refs: tuple[TensorRef, ...]) -> dict[str, list]:
        out = {"native": [machine.native.tensor(r).clone() for r in refs]}
        for m in self.algebras:
            out[m.name] = [machine.value(m, r) for r in refs]
        return out

    def _meet(self, meeting: Rendezvous, group: tuple[int, ...]) -> None:
        """Every member has come: what each of them gets."""
        descr = [meeting.calls[r].collective for r in group]
        kinds = {d.kind for d in descr}
        if len(kinds) > 1:
            raise ReplayError(f"members of {group} meet in different collectives: {sorted(kinds)}")
        for r, values in zip(group, deliver(NATIVE, descr, [meeting.ins[r]["native"] for r in group])):
            meeting.results[r] = {"native": values}
        for m in self.algebras:
            ins = [meeting.ins[r][m.name] for r in group]
            self.machines[group[-1]].place(m, meeting.calls[group[-1]])
            if any(not isinstance(v, torch.Tensor) for x in ins for v in x):
                got = deliver(m, descr, [[m.data(v) if isinstance(v, torch.Tensor) else v for v in x] for x in ins])
                for r, values in zip(group, got):
                    meeting.results[r][m.name] = values
        meeting.ins.clear()

    def _write_native(self, machine: Machine, call: OpCall, values: list) -> None:
        for ref, v in zip(call.collective.outputs, values):
            if v is not None:
                machine.native.write(ref, v.reshape(ref.size))

    def _write(self, machine: Machine, m: Algebra, call: OpCall, values: list) -> None:
        mem = machine.memory[m.name]
        for k, (ref, v) in enumerate(zip(call.collective.outputs, values)):
            if v is None:
                continue
            if isinstance(v, torch.Tensor) or not (is_float(ref.dtype) or ref.dtype == "bool"):
                mem.overwrite(ref, machine.native.tensor(ref))
            else:
                mem.store(ref, v if tuple(v.shape) == ref.size else m.reshape(v, ref.size))
                machine.elements += ref.numel
                if machine.hooks.value and is_float(ref.dtype):
                    machine.hooks.value(machine, m, call, k, ref)

    def _receive(self, machine: Machine, call: OpCall) -> bool:
        c = call.collective
        values = self.mail.pop(message(machine.rank, c), None)
        if values is None:
            return False
        self._write_native(machine, call, values["native"])
        for m in self.algebras:
            self._write(machine, m, call, values[m.name])
        for hook in machine.hooks.after:
            hook(machine, call, [])
        return True

    # ---- tv.* calls
    def _wait(self, machine: Machine, call: OpCall) -> bool:
        key = (machine.rank, call.args[0])
        op = self.issued.get(key)
        if op is not None and not self._complete(machine, op):
            return False
        self.issued.pop(key, None)
        machine.pending.pop(call.args[0], None)
        for hook in machine.hooks.waited:
            hook(machine, call)
        return True

    def _symbol(self, machine: Machine, call: OpCall) -> bool:
        kind, name, ref = call.args
        blob = machine.native.blobs.get(f"symbol.{name}")
        if blob is not None and call.writes:
            data = torch.from_numpy(blob.copy()) if hasattr(blob, "copy") else blob
            machine.native.write(ref, data.view(torch.uint8).view(machine.native.tensor(ref).dtype).reshape(ref.size)
                                 if data.dtype != machine.native.tensor(ref).dtype else data.reshape(ref.size))
        self._supplied(machine, kind, name, ref)
        return True

    def _data(self, machine: Machine, call: OpCall) -> bool:
        self._supplied(machine, "data", *call.args)
        return self._told(machine, call)

    def _supplied(self, machine: Machine, kind: str, name: str, ref: TensorRef) -> None:
        """Values that do not come out of the trace."""
        values = machine.hooks.symbol(machine, kind, name, ref) if machine.hooks.symbol else None
        for m in self.algebras if values else ():
            machine.memory[m.name].store(ref, m.reshape(values[m.name], ref.size))

    def _parameter(self, machine: Machine, call: OpCall) -> bool:
        name, ref = call.args
        if isinstance(ref, TensorRef) and is_float(ref.dtype):
            values = {m.name: machine.value(m, ref) for m in self.algebras}
            machine.params.append((call.name[3:], name, ref, values))
        return True

    def _output(self, machine: Machine, call: OpCall) -> bool:
        kind, name, step, value = call.args[:4]
        declare = call.kwargs.get("declare")
        group = call.kwargs.get("group")
        ref = value if isinstance(value, TensorRef) else None
        if machine.pending and ref is not None:
            machine._check_pending(OpCall(call.index, call.name, (ref,), {}, None, span=call.span), f"the {kind} {name}, as it is taken here,")
        values: dict = {}
        native = None
        if isinstance(value, (TensorRef, ScalarRef)):
            values = {m.name: machine.value(m, value) for m in self.algebras}
            native = machine.native.tensor(ref).clone() if ref is not None else machine.native.scalars.get(value.id)
        elif value is not None:
            values, native = {m.name: m.const(value) for m in self.algebras}, value
        for m in self.algebras:
            if isinstance(values.get(m.name), torch.Tensor):
                values[m.name] = m.data(values[m.name])
        machine.outputs.append(Recorded(kind, name, step, machine.rank, call, ref, values, native, declare,
                                        tuple(group.items) if isinstance(group, Sequence) else ()))
        return True

    def _step(self, machine: Machine, call: OpCall) -> bool:
        machine.step = call.args[0]
        return True

    def _decision(self, machine: Machine, call: OpCall) -> bool:
        op, *operands = call.args
        for m in self.algebras:
            values = tuple(machine.value(m, a) if isinstance(a, (ScalarRef, TensorRef)) else m.const(a) for a in operands)
            if not all(m.is_const(v) for v in values if not isinstance(v, torch.Tensor)):
                machine.decide(call, f"compare:{op}", m, values, call.outs)
        return True

    def _resize(self, machine: Machine, call: OpCall) -> bool:
        sid, nbytes = resized(call), call.args[1]
        machine.native.resize(sid, nbytes)
        for mem in machine.memory.values():
            if sid in mem.cells:
                mem.forget(TensorRef(sid, 0, (0,), (1,), mem.dtypes[sid]))
        return True

    def _told(self, machine: Machine, call: OpCall) -> bool:
        """Nothing happens in memory; who follows data wants to know."""
        for hook in machine.hooks.before:
            hook(machine, call)
        machine.look_at_bytes(call, reads(call))
        return True


PSEUDO = {"tv.wait": World._wait, "tv.symbol": World._symbol, "tv.param": World._parameter, "tv.stepped": World._parameter,
          "tv.output": World._output, "tv.step": World._step, "tv.decision": World._decision, "tv.resize": World._resize,
          "tv.escape": World._told, "tv.data": World._data}


def replay(program: Program, algebras: list[Algebra], table: OpTable, hooks: Hooks | None = None, progress=None) -> World:
    """Replay all ranks; the machines hold outputs, parameters, decisions and diagnostics afterwards."""
    world = World(program, algebras, table, hooks or Hooks())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                  # thousands of small calls: more threads only get in each other's way
    try:
        with torch.no_grad():
            world.run(progress)
    finally:
        torch.set_num_threads(threads)
    return world
