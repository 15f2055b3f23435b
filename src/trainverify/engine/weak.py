"""Weak-spec warnings: what this very input could not have revealed."""
from __future__ import annotations

from collections import Counter

import torch

from trainverify.diagnostics import Diagnostic
from trainverify.engine.analysis import Analysis
from trainverify.engine.facts import valid_tokens
from trainverify.ir.trace import Program


def weak_spec(analysis: Analysis, parallel: Program, groups: dict[tuple[int, ...], str], steps: int) -> list[Diagnostic]:
    """All warnings that apply, in the order of their codes."""
    found = [*_tokens(analysis), *_batch(analysis), *_clipping(analysis), *_rates(analysis, steps), *_gradients(analysis),
             *_degrees(groups, analysis), *_rings(parallel), *_vocabulary(analysis)]
    return sorted(found, key=lambda d: (d.code, d.message))


def _warn(code: str, message: str, fix: str) -> Diagnostic:
    return Diagnostic(code, message, "warning", fix=fix)


def _tokens(analysis: Analysis) -> list[Diagnostic]:
    counts = [n for calls in valid_tokens(analysis.facts["parallel"], analysis.coverage, 1) for n in calls]
    if len(counts) > 1 and len(set(counts)) == 1:
        return [_warn("WEAK001", f"every rank and microbatch has {counts[0]} valid tokens: a mean of means equals the mean over all tokens",
                      "mask a different number of labels in each sample")]
    return []


def _batch(analysis: Analysis) -> list[Diagnostic]:
    shapes = analysis.facts["reference"].batch_shapes
    out = []
    if any(len(s) > 1 and s[0] == 1 for s in shapes):
        out.append(_warn("WEAK002", "the batch holds one sample: batch and sequence reductions look alike", "use at least two samples"))
    square = sorted(s for s in shapes if len(s) > 1 and s[0] == s[1] > 1)
    if square:
        out.append(_warn("WEAK009", f"batch and sequence have the same size {square[0][0]}: a transpose of the two does not show", "use distinct sizes"))
    return out


def _clipping(analysis: Analysis) -> list[Diagnostic]:
    clip = analysis.facts["reference"].clip
    if clip and all(c >= 1 for c in clip):
        return [_warn("WEAK003", f"gradient clipping never binds (coefficient {min(clip):.3g}): a wrong norm does not show", "lower max_norm so that it binds")]
    return []


def _rates(analysis: Analysis, steps: int) -> list[Diagnostic]:
    out = []
    rates = analysis.facts["reference"].rates
    if _unchanged(analysis):
        out.append(_warn("WEAK004", "the reference's parameters do not change in a step (is lr 0?): a wrong update does not show", "use lr > 0"))
    if rates and all(decay == 0 for _, decay in rates):
        out.append(_warn("WEAK011", "weight_decay is 0: a wrong one would not show", "use weight_decay > 0"))
    if steps == 1 and any(r.kind == "state" for r in analysis.first.reference.machines[0].outputs):
        out.append(_warn("WEAK005", "optimizer state starts at zero and one step is run: stale state does not show", "run two steps (--steps 2)"))
    return out


def _unchanged(analysis: Analysis) -> bool:
    comparison, machine = analysis.first.comparison, analysis.first.reference.machines[0]
    updated = [r for r in machine.outputs if r.kind == "parameter" and r.ref is not None]
    real = analysis.first.real
    for r in updated:
        line = comparison.lineage_of(machine.rank, "parameter", r.name, world_ref=True)
        if line is None or not line.bound:
            continue
        before = real.take([comparison.every["real"]], torch.from_numpy(line.numbers.reshape(-1)) + 1)
        if bool((before.t != r.values["real"].t.reshape(-1)).any()):
            return False
    return bool(updated)


def _gradients(analysis: Analysis) -> list[Diagnostic]:
    recs = analysis.first.reference.machines[0].outputs
    zero = [r.name for r in recs if r.kind == "gradient" and (r.native is None or not bool(torch.as_tensor(r.native).any()))]
    if not zero:
        return []
    names = list(dict.fromkeys(zero))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return [_warn("WEAK006", f"no gradient reaches {shown}", "use a batch that exercises every parameter")]


def _degrees(groups: dict[tuple[int, ...], str], analysis: Analysis) -> list[Diagnostic]:
    sizes = {axis: len(ranks) for ranks, axis in groups.items() if axis}
    out = []
    for n, times in Counter(sizes.values()).items():
        axes = sorted(a for a in sizes if sizes[a] == n)
        if times > 1:
            out.append(_warn("WEAK007", f"mesh axes {' and '.join(axes)} have the same degree {n}: 1/{axes[0]} and 1/{axes[1]} look alike",
                             "verify a case with distinct degrees"))
    calls = {len(c) for c in valid_tokens(analysis.facts["parallel"], analysis.coverage, 1)}
    if len(calls) == 1 and (n := calls.pop()) > 1 and n in sizes.values():
        axis = next(a for a in sizes if sizes[a] == n)
        out.append(_warn("WEAK007", f"{n} microbatches and {axis}={n}: 1/microbatches and 1/{axis} look alike", "use distinct numbers"))
    return out


def _rings(parallel: Program) -> list[Diagnostic]:
    """A rank that sends to and receives from one peer within a group of two: left and right neighbour are the same."""
    for trace in parallel.traces:
        to = {c.collective.peer for c in trace.ops if c.collective is not None and c.collective.kind == "send" and len(c.collective.group) == 2}
        back = {c.collective.peer for c in trace.ops if c.collective is not None and c.collective.kind == "recv" and len(c.collective.group) == 2}
        if to & back and parallel.traces[0].world_size == 2:
            return [_warn("WEAK008", "messages go around a ring of 2: the left and the right neighbour are the same rank", "verify with 3 or more ranks in the ring")]
    return []


def _vocabulary(analysis: Analysis) -> list[Diagnostic]:
    """A vocabulary sharded by rows, none of whose shard edges occurs among the token ids."""
    comparison = analysis.first.comparison
    used = {shape: ids for shape, ids in analysis.facts["reference"].ids.items()}
    edges: dict[str, set[int]] = {}
    for line in comparison.lineage.values():
        held = line.numbers[line.numbers >= 0]
        if not len(held):
            continue
        block = analysis.symbols.blocks_in_order[int(analysis.symbols.owner(held[:1])[0])]
        if block.shape in used and len(block.shape) == 2 and len(held) < block.n:
            rows = (held - block.first) // block.shape[1]
            if rows.min() > 0:
                edges.setdefault(block.name, set()).update((int(rows.min()) - 1, int(rows.min())))
    out = []
    for name, rows in sorted(edges.items()):
        shape = analysis.symbols.blocks[name].shape
        absent = sorted(rows - used[shape])
        if absent:
            out.append(_warn("WEAK010", f"token ids {absent} at the shard edges of {name} do not occur: an off-by-one in the range test does not show",
                             "put the first and last id of each vocabulary shard into the batch"))
    return out
