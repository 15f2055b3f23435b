"""What a replay shows about the input of a run: token counts, ids, clipping, optimizer settings. For weak-spec warnings only."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from trainverify.ir.trace import OpCall, TensorRef
from trainverify.relate.coverage import Coverage
from trainverify.replay.machine import Machine

FUSED = ("aten._fused_adamw_", "aten._fused_adam_", "aten._fused_sgd_")


@dataclass(slots=True)
class Facts:
    """Collected per side by the `before` hook, in program order."""

    valid_tokens: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))   # (rank, step) -> per loss call
    ids: dict[tuple[int, ...], set[int]] = field(default_factory=lambda: defaultdict(set))    # shape of the table -> ids looked up
    batch_shapes: set[tuple[int, ...]] = field(default_factory=set)
    clip: list[float] = field(default_factory=list)                                          # coefficients before clamping to 1
    rates: set[tuple[float, float]] = field(default_factory=set)                             # (lr, weight_decay) of fused optimizers

    def before(self, machine: Machine, call: OpCall) -> None:
        base = ".".join(call.name.split(".")[:2])
        if base in ("aten.nll_loss_forward", "aten.nll_loss2d_forward"):
            target, ignore = machine.native.tensor(call.args[1]), call.args[4]
            self.valid_tokens[(machine.rank, machine.step)].append(int((target != ignore).sum()))
        elif base == "aten.embedding" and isinstance(call.args[1], TensorRef):
            index = machine.native.tensor(call.args[1])
            self.ids[call.args[0].size].update(index.unique().tolist())
            self.batch_shapes.add(tuple(index.shape))
        elif base in ("aten.clamp", "aten.clamp_max") and isinstance(call.args[0], TensorRef) and call.args[0].size == ():
            bound = call.kwargs.get("max", call.args[-1])
            if bound == 1.0:
                self.clip.append(float(machine.native.tensor(call.args[0])))
        elif base in FUSED:
            self.rates.add((_number(machine, call.kwargs.get("lr", 0.0)), _number(machine, call.kwargs.get("weight_decay", 0.0))))


def _number(machine: Machine, a) -> float:
    value = machine.native.decode(a)
    return float(value) if not isinstance(value, torch.Tensor) else float(value.reshape(-1)[0])


def valid_tokens(facts: Facts, coverage: Coverage, step: int) -> list[tuple[int, ...]]:
    """Per rank that reads samples of its own (one of several that read the same): how many tokens each of its loss calls counts.

    Where no loss of torch is called, comparisons of labels with a negative number tell it.
    """
    held = {rank: tuple(n) for (rank, s), n in facts.valid_tokens.items() if s == step} or coverage.parallel.compared_labels(step)
    seen: dict[object, tuple[int, ...]] = {}
    for rank, counts in sorted(held.items()):
        seen.setdefault(coverage.parallel.read_by(rank, step) or rank, counts)
    return list(seen.values())
