"""What a replay shows about the input of a run: token counts, ids, clipping, optimizer settings. For weak-spec warnings only."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from trainverify.ir.trace import OpCall, ScalarRef, TensorRef
from trainverify.relate.coverage import Coverage
from trainverify.replay.machine import Machine

@dataclass(slots=True)
class Facts:
    """Collected per side by the `before` hook, in program order."""

    valid_tokens: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))   # (rank, step) -> per loss call
    ids: set[int] = field(default_factory=set)                                               # token ids looked up in the largest table
    tables: dict[int, torch.Tensor] = field(default_factory=dict)                            # rank -> the largest table, as first used
    attention: set[tuple[int, ...]] = field(default_factory=set)                             # shapes of queries
    clip: list[float] = field(default_factory=list)                                          # coefficients before clamping to 1

    def before(self, machine: Machine, call: OpCall) -> None:
        base = ".".join(call.name.split(".")[:2])
        if base in ("aten.nll_loss_forward", "aten.nll_loss2d_forward"):
            target, ignore = machine.native.tensor(call.args[1]), call.args[4]
            span = machine.span(call)
            if span is not None and span.phase == "backward":
                return                        # a checkpoint computes it again
            self.valid_tokens[(machine.rank, machine.step)].append(int((target != ignore).sum()))
        elif base == "aten.embedding" and isinstance(call.args[1], TensorRef):
            self._look_up(machine, call)
        elif "scaled_dot_product" in base and not base.endswith("backward"):
            self.attention.add(call.args[0].size)
        elif base in ("aten.clamp", "aten.clamp_max") and isinstance(call.args[0], TensorRef) and call.args[0].size == ():
            if _upper(base, call) == 1.0:
                self.clip.append(float(machine.native.tensor(call.args[0])))
        elif base == "tv.scalar" and call.name == "tv.scalar.min" and 1.0 in call.args:
            self.clip += [machine.native.scalars[a.id] for a in call.args if isinstance(a, ScalarRef)]

    def _look_up(self, machine: Machine, call: OpCall) -> None:
        rows, table = call.args[0].size[0], self.tables.get(machine.rank)
        if table is None or rows > len(table):
            self.tables[machine.rank] = machine.native.tensor(call.args[0]).clone()
            self.ids.clear()
        if rows == len(self.tables[machine.rank]):
            self.ids.update(machine.native.tensor(call.args[1]).unique().tolist())


def _upper(base: str, call: OpCall) -> object:
    """The bound from above of a clamp; one that is bound from below alone has none (a count of tokens that is at least 1)."""
    position = 1 if base == "aten.clamp_max" else 2
    return call.kwargs.get("max", call.args[position] if len(call.args) > position else None)


def valid_tokens(facts: Facts, coverage: Coverage) -> list[tuple[int, ...]]:
    """Per rank that reads samples of its own (one of several that read the same): how many tokens each of its loss calls counts.

    In the last step: a first one may run something for its shapes only. Where no loss of torch is called, comparisons of labels
    with a negative number tell it.
    """
    step = max((s for s, _, _ in coverage.parallel.counts), default=0) or max((s for _, s in facts.valid_tokens), default=0)
    held = {rank: tuple(n) for (rank, s), n in facts.valid_tokens.items() if s == step} or coverage.parallel.compared_labels(step)
    seen: dict[object, tuple[int, ...]] = {}
    for rank, counts in sorted(held.items()):
        seen.setdefault(coverage.parallel.read_by(rank, step) or rank, counts)
    return list(seen.values())
