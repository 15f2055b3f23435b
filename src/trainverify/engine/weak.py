"""Weak-spec warnings: what this very input could not have revealed (not trusted: a warning never changes a verdict)."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import torch

from trainverify.diagnostics import Diagnostic
from trainverify.engine.analysis import Analysis
from trainverify.engine.facts import valid_tokens
from trainverify.ir.trace import Program

SHOWN = 4


def weak_spec(analysis: Analysis, reference: Program, parallel: Program, groups: dict[tuple[int, ...], str], steps: int) -> list[Diagnostic]:
    """All warnings that apply, in the order of their codes."""
    counts = valid_tokens(analysis.facts["parallel"], analysis.coverage)
    found = [*_tokens(counts), *_batch(analysis), *_clipping(analysis), *_optimizer(analysis, reference, steps), *_gradients(analysis, steps),
             *_degrees(groups, len(parallel.traces), counts), *_rings(parallel), *_sizes(analysis), *_vocabulary(analysis)]
    return sorted(found, key=lambda d: (d.code, d.message))


def _warn(code: str, message: str, fix: str) -> Diagnostic:
    return Diagnostic(code, message, "warning", fix=fix)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---- the batch
def _tokens(counts: list[tuple[int, ...]]) -> list[Diagnostic]:
    every = [n for calls in counts for n in calls]
    if len(every) > 1 and len(set(every)) == 1:
        return [_warn("WEAK001", f"every rank and microbatch has {every[0]} valid tokens: a mean of means equals the mean over all tokens",
                      "mask a different number of labels in each sample")]
    return []


def _batch(analysis: Analysis) -> list[Diagnostic]:
    batch, reads = analysis.coverage.batch, analysis.coverage.parallel
    if batch.samples == 1:
        return [_warn("WEAK002", "the batch holds one sample: batch and sequence reductions look alike", "use at least two samples")]
    calls = analysis.facts["parallel"].valid_tokens
    for (step, rank, _) in reads.counts:
        held = [n for t in analysis.coverage.tensors if (n := reads.samples(t, rank, step))]
        if step == analysis.steps and held and max(held) == len(calls.get((rank, step), ())):
            return [_warn("WEAK002", f"rank {rank} reads one sample at a time: batch and sequence reductions look alike",
                          "give each rank and microbatch at least two samples")]
    return []


# ---- the optimizer
def _clipping(analysis: Analysis) -> list[Diagnostic]:
    clip = analysis.facts["reference"].clip
    if clip and all(c >= 1 for c in clip):
        return [_warn("WEAK003", f"gradient clipping never binds (coefficient {min(clip):.3g}): a wrong norm does not show", "lower max_norm so that it binds")]
    return []


def _optimizer(analysis: Analysis, reference: Program, steps: int) -> list[Diagnostic]:
    out = []
    settings = msgspec.json.decode(reference.traces[0].meta.get("optimizers", "[]"))
    if _unchanged(analysis):
        why = "lr is 0" if settings and all(s.get("lr") == 0 for s in settings) else "is lr 0?"
        out.append(_warn("WEAK004", f"the reference's parameters do not change in any step ({why}): a wrong update does not show", "use lr > 0"))
    decays = [s["weight_decay"] for s in settings if "weight_decay" in s]
    if decays and not any(decays):
        out.append(_warn("WEAK011", "weight_decay is 0: a wrong one would not show", "use weight_decay > 0"))
    kept = any(r.kind == "state" and not r.name.endswith("::step") for r in analysis.first.reference.machines[0].outputs)
    if steps == 1 and kept and not any(b.kind == "state" for b in analysis.symbols.blocks_in_order):
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


def _gradients(analysis: Analysis, steps: int) -> list[Diagnostic]:
    """Parameters whose gradient is absent or zero in every step."""
    zero: dict[str, int] = defaultdict(int)
    for r in analysis.first.reference.machines[0].outputs:
        if r.kind == "gradient":
            zero[r.name] += r.native is None or not bool(torch.as_tensor(r.native).any())
    names = [name for name, times in zero.items() if times == steps]
    if not names:
        return []
    return [_warn("WEAK006", f"no gradient reaches {_names(names)}", "use a batch that exercises every parameter")]


# ---- degrees and rings
def _degrees(groups: dict[tuple[int, ...], str], world: int, counts: list[tuple[int, ...]]) -> list[Diagnostic]:
    out = []
    mine: dict[int, list[str]] = defaultdict(list)         # size -> groups of one rank with that size
    for ranks, axis in groups.items():
        if 0 in ranks and len(ranks) < world:
            mine[len(ranks)].append(axis or f"group {', '.join(map(str, ranks))}")
    for n, names in mine.items():
        if len(names) > 1:
            out.append(_warn("WEAK007", f"{_names(names)} have the same degree {n}: a division by the wrong one of them does not show",
                             "verify a case with distinct degrees"))
    microbatches = {len(calls) for calls in counts}
    if microbatches == {len(counts)} and len(counts) > 1:
        out.append(_warn("WEAK007", f"{len(counts)} microbatches on {len(counts)} data-parallel ranks: 1/microbatches and 1/ranks look alike",
                         "use distinct numbers"))
    return out


def _rings(parallel: Program) -> list[Diagnostic]:
    """Two ranks that exchange messages with each other only: the left and the right neighbour are the same."""
    to: dict[int, set[int]] = defaultdict(set)
    back: dict[int, set[int]] = defaultdict(set)
    for trace in parallel.traces:
        for c in (call.collective for call in trace.ops if call.collective is not None):
            if c.kind in ("send", "recv"):
                (to if c.kind == "send" else back)[trace.rank].add(c.peer)
            elif c.kind == "all_to_all" and len(c.group) == 2 and c.in_splits:
                me = c.group.index(trace.rank)
                if c.in_splits[me] == 0 < sum(c.in_splits):
                    to[trace.rank].add(c.group[1 - me])
                    back[trace.rank].add(c.group[1 - me])
                elif sum(c.in_splits):
                    to[trace.rank].add(trace.rank)         # not a rotation
    for rank, peers in to.items():
        if len(peers) == 1 and peers == back[rank]:
            (other,) = peers
            if to[other] == back[other] == {rank}:
                return [_warn("WEAK008", f"ranks {min(rank, other)} and {max(rank, other)} exchange messages with each other only: in a ring of 2 "
                              "the left and the right neighbour are the same", "verify with 3 or more ranks in the ring")]
    return []


# ---- sizes
def _sizes(analysis: Analysis) -> list[Diagnostic]:
    out = []
    for tensor in analysis.coverage.tensors:
        if len(tensor.shape) > 1 and tensor.shape[0] == tensor.shape[1] > 1:
            out.append(_warn("WEAK009", f"batch and sequence have the same size {tensor.shape[0]}: a transpose of the two does not show", "use distinct sizes"))
            break
    # What a rank computes with decides: a division over ranks makes sizes distinct that are equal in the reference.
    for shape in sorted(analysis.facts["parallel"].attention):
        sizes = [n for n in shape if n > 1]
        if len(set(sizes)) < len(sizes):
            out.append(_warn("WEAK009", f"attention works on {list(shape)} (batch, heads, sequence, head size), of which some are equal: "
                             "a transpose of those does not show", "use distinct sizes"))
            break
    held = {name: line.numbers.shape for (_, how, name), line in analysis.first.comparison.lineage.items() if how == "param"}
    square = sorted(name for name, shape in held.items() if len(shape) == 2 and shape[0] == shape[1] > 1)
    if square:
        out.append(_warn("WEAK009", f"{_names(square)} are square: a transposed weight does not show by its shape", "use distinct sizes"))
    return out


def _vocabulary(analysis: Analysis) -> list[Diagnostic]:
    """An embedding of which ranks look up their own range of rows, and the ids at whose edges do not occur."""
    whole = analysis.facts["reference"].tables.get(0)
    if whole is None:
        return []
    edges: set[int] = set()
    for shard in analysis.facts["parallel"].tables.values():
        if 0 < len(shard) < len(whole) and shard.shape[1:] == whole.shape[1:]:
            first = (whole.to(shard.dtype) == shard[0]).all(1).nonzero().reshape(-1).tolist()
            if len(first) == 1 and first[0] > 0:
                edges |= {first[0] - 1, first[0]}
    absent = sorted(edges - analysis.facts["reference"].ids)
    if not absent:
        return []
    return [_warn("WEAK010", f"token ids {', '.join(map(str, absent))} at the edges of the vocabulary's shards do not occur: an off-by-one in the range "
                  "test does not show", "put the first and last id of each vocabulary shard into the batch")]
