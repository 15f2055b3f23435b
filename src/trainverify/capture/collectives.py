"""Communication calls: executed over the channel, recorded as `ir.Collective` (trusted: what each rank receives is decided here).

One executor carries out all plans (capture/plans.py). A call that the program awaits later is posted when it is issued and
completed at its wait, so that ranks which issue and wait in different orders meet as they would on real hardware; a message
is received at its wait, and belongs to the receive that was issued first. What arrives is written into the outputs as a backend would: unseen by autograd.
"""
from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import Work

from trainverify.capture import meta, plans
from trainverify.capture.digest import crc
from trainverify.capture.encode import dtype_name
from trainverify.capture.futures import Futures
from trainverify.capture.plans import Plan, PlanError, plan_of
from trainverify.capture.quiet import unseen
from trainverify.capture.wire import Signature
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import Arg, Collective, Sequence
from trainverify.ops.reduction import REDUCE_OPS, reduce_tensors

if TYPE_CHECKING:
    from trainverify.capture.recorder import Recorder

_MESSAGES = ("send", "recv")


class Pending:
    """A call that was issued and not yet awaited."""

    __slots__ = ("id", "plan", "refs", "ticket", "got", "signature", "done")

    def __init__(self, id: int, plan: Plan, refs: tuple, signature: Signature):
        self.id, self.plan, self.refs, self.signature = id, plan, refs, signature
        self.ticket: int | None = None
        self.got: list | None = None           # payloads that are here already
        self.done = False


class RecordedWork(Work):
    """What an asynchronous c10d call returns; every way of waiting for it completes and records it."""

    def __init__(self, collectives: Collectives, pending: Pending | None, outputs: list[torch.Tensor]):
        super().__init__()
        self._collectives, self._pending, self._outputs = collectives, pending, outputs

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._collectives.wait(pending)

    def wait(self, timeout=None) -> bool:
        self._finish()
        return True

    def synchronize(self) -> None:
        self._finish()

    def block_current_stream(self) -> None:
        self._finish()

    def is_completed(self) -> bool:
        self._finish()
        return True

    def is_success(self) -> bool:
        self._finish()
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        self._finish()
        return self._outputs

    def get_future(self) -> torch.futures.Future:
        return self._collectives.futures.future(self.result)


class Collectives:
    """One rank's communication."""

    def __init__(self, recorder: Recorder, channel: Any):
        self.recorder, self.channel, self.rank = recorder, channel, recorder.rank
        self._numbers: dict[tuple, int] = defaultdict(int)
        self._works: list[RecordedWork] = []   # C++ holds them by pointer: the Python halves must live as long
        self._functional: dict[int, Pending] = {}
        self._receives: dict[tuple, deque[Pending]] = defaultdict(deque)
        self._count = 0
        self.futures = Futures()

    # ---- issue
    def call(self, func, args, kwargs) -> Any:
        """Carry out a dispatched communication op; its result as torch expects it."""
        if func._opname == "wait_tensor":
            return self._wait_tensor(args[0])
        try:
            plan = plan_of(func, args, kwargs)
            self._check(plan)
        except PlanError as e:
            raise Fault(Diagnostic("RUN017", str(e), span=self.recorder.spans.span(), ranks=(self.rank,))) from e
        pending = self._issue(str(func), plan)
        if plan.functional:
            for t in plan.outputs if pending is not None else ():
                self._functional[t.untyped_storage()._cdata] = pending
            return plan.result
        work = RecordedWork(self, pending, plan.outputs or plan.inputs)
        self._works.append(work)
        returns = len(func._schema.returns)
        return None if returns == 0 else Work.boxed(work) if returns == 1 else (plan.result, Work.boxed(work))

    def _check(self, plan: Plan) -> None:
        if plan.reduce_op is not None and plan.reduce_op not in REDUCE_OPS:
            raise PlanError(f"reduce op {plan.reduce_op} is not supported")
        for t in (*plan.inputs, *plan.outputs):
            if t.layout is not torch.strided or (t.is_meta and self.recorder.floats is None):
                raise PlanError(f"{plan.kind} of a {t.layout} tensor on {t.device} is not supported")
            if self.recorder.floats is not None and not t.is_meta and not self.recorder.floats.has_memory(t):
                raise meta.NeedsValues(meta.DECIDED)
            if t.is_conj() or t.is_neg():
                raise PlanError(f"{plan.kind} of a lazily conjugated or negated tensor: call resolve_conj() first")
        dtypes = {t.dtype for t in (*plan.inputs, *plan.outputs)}
        if len(dtypes) > 1:
            raise PlanError(f"{plan.kind} between different dtypes: {', '.join(sorted(map(dtype_name, dtypes)))}")

    def _issue(self, name: str, plan: Plan) -> Pending | None:
        recorder, encode = self.recorder, self.recorder.encoder
        inputs = tuple([encode.tensor(t, False) for t in plan.inputs])
        outputs = tuple([encode.tensor(t, self._fresh(plan, t)) for t in plan.outputs])
        messages = plan.kind in _MESSAGES
        seq = self._number((plan.kind, plan.peer, plan.tag, plan.group_name) if messages else (plan.group, plan.group_name))
        asynchronous = plan.pending
        work = self._count if asynchronous else None
        self._count += asynchronous
        collective = Collective(plan.kind, plan.group, plan.group_name, seq, inputs, outputs, plan.reduce_op, plan.factor, plan.root,
                                plan.peer, plan.tag, plan.in_splits, plan.out_splits, plan.listed, work)
        outs: Arg = None
        writes = outputs
        if plan.functional:
            outs = outputs[0] if isinstance(plan.result, torch.Tensor) else Sequence(outputs)
            writes = tuple(o for o in outputs if o in inputs)
        call = recorder.append(name, inputs, outs=outs, writes=() if plan.kind == "recv" else writes, reads=plan.inputs, collective=collective)
        pending = Pending(-1 if work is None else work, plan, outputs, self._signature(plan, recorder.spans.items[call.span]))
        self._start(pending, seq)
        if asynchronous:
            return pending
        self._complete(pending)
        if self.recorder.floats is None:
            call.digest_out = crc(plan.outputs)
        return None

    @staticmethod
    def _fresh(plan: Plan, t: torch.Tensor) -> bool:
        """Whether an output was allocated by this very call."""
        return plan.functional and all(t is not i for i in plan.inputs) and plan.kind != "recv"

    def _number(self, key: tuple) -> int:
        self._numbers[key] += 1
        return self._numbers[key]

    def _signature(self, plan: Plan, span) -> Signature:
        ins, outs = plans.pairwise(plan)
        return Signature(plan.kind, plan.reduce_op, plans.sizes(plan), tuple(dtype_name(d) for d in plans.dtypes(plan)), plan.group_name,
                         span, plan.root, plan.peer, ins, outs)

    def _start(self, pending: Pending, seq: int) -> None:
        plan = pending.plan
        if plan.kind == "recv":
            self._receives[(plan.peer, plan.group_name, plan.tag)].append(pending)
            return
        if plan.kind == "send":
            self.channel.send(plan.peer, (plan.group_name, plan.tag), plan.inputs, pending.signature)
            return
        payload = self._payload(plan)
        if len(plan.group) == 1:
            with unseen():
                pending.got = [None if payload is None else [t.clone() for t in payload]]
        else:
            pending.ticket = self.channel.post(plan.group, seq, pending.signature, payload)

    def _payload(self, plan: Plan) -> list[torch.Tensor] | None:
        if plan.kind in ("broadcast", "scatter") and plan.root != self.rank:
            return None
        if plan.kind == "all_to_all" and not plan.listed:
            return list(plan.inputs[0].split(plan.in_splits))
        return plan.inputs

    # ---- completion
    def wait(self, pending: Pending) -> None:
        """The program waits for a pending call: complete it and record the wait."""
        if pending.done:
            return
        plan = pending.plan
        with unseen():
            self._complete(pending)
            writes = pending.refs if plan.kind == "recv" else ()
            self.recorder.append("tv.wait", (pending.id,), writes=writes, written=plan.outputs)

    def _wait_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        pending = self._functional.pop(tensor.untyped_storage()._cdata, None)
        if pending is not None:
            for t in pending.plan.outputs:
                self._functional.pop(t.untyped_storage()._cdata, None)
            self.wait(pending)
        return tensor

    def _complete(self, pending: Pending) -> None:
        pending.done = True
        plan = pending.plan
        if plan.kind == "send":
            return
        if plan.kind == "recv":
            got = self._message(pending)
        else:
            got = pending.got if pending.ticket is None else self.channel.complete(pending.ticket)
        if plan.outputs and all(t.is_meta for t in plan.outputs):      # at full size: the others' sizes were compared when they met
            for t in plan.outputs:
                self.recorder.floats.forget(t)
            pending.got = None
            return
        with unseen():
            for output, ref, value in zip(plan.outputs, pending.refs, self._results(plan, got)):
                if value.is_meta:
                    raise Fault(meta.refusal(plan.kind, "another rank computed from floats what this one has as values", self.recorder.spans.span(), self.rank))
                output.copy_(value.reshape(output.shape))
                self.recorder.encoder.wrote(output, ref.storage)
        pending.got = None

    def _message(self, pending: Pending) -> list:
        """Messages of one sender and tag go to the receives in the order of their issue, in whatever order these are awaited."""
        plan = pending.plan
        waiting = self._receives[(plan.peer, plan.group_name, plan.tag)]
        while pending.got is None:
            first = waiting.popleft()
            first.got = [self.channel.recv(plan.peer, (plan.group_name, plan.tag), first.signature)]
        return pending.got

    def _results(self, plan: Plan, got: list) -> list[torch.Tensor]:
        """What this rank's outputs receive; `got` has each member's payload in group order."""
        n, me, kind = len(plan.group), plan.group.index(self.rank), plan.kind
        count = len(plan.outputs)
        if kind == "recv":
            return got[0]
        if kind in ("all_reduce", "reduce"):
            return [reduce_tensors([g[i] for g in got], plan.reduce_op, plan.factor) for i in range(count)]
        if kind == "broadcast":
            return got[plan.group.index(plan.root)]
        if kind == "all_gather" and not plan.listed:
            return [torch.cat([g[i].reshape(-1) for g in got]) for i in range(count)]
        if kind in ("all_gather", "gather"):
            return [got[k % n][k // n] for k in range(count)]
        if kind == "reduce_scatter":
            mine = [[g[i * n + me] if plan.listed else _chunk(g[i], me, n) for g in got] for i in range(count)]
            return [reduce_tensors(parts, plan.reduce_op, plan.factor) for parts in mine]
        if kind == "all_to_all":
            parts = [got[j][me] for j in range(n)]
            return parts if plan.listed else [torch.cat(parts)]
        if kind == "scatter":
            return [got[plan.group.index(plan.root)][i * n + me] for i in range(count)]
        return []


def _chunk(t: torch.Tensor, me: int, n: int) -> torch.Tensor:
    return t.reshape(-1).chunk(n)[me] if t.numel() else t.reshape(-1)
