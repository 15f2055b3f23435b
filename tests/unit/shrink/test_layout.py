"""References at reduced sizes address exactly the recorded elements at the kept indices."""
import random

import numpy as np
import pytest
import torch

from trainverify.ir.trace import OpCall, Program, Storage, TensorRef, Trace
from trainverify.shrink.layout import Layout
from trainverify.shrink.repeat import Forms, Repeats
from trainverify.shrink.spaces import Kept, Spaces


def layout_of(numel: int, refs: list[TensorRef]) -> tuple[Spaces, Layout]:
    spaces = Spaces()
    ops = [OpCall(i, "aten.clone.default", (r,), {}, None) for i, r in enumerate(refs)]
    trace = Trace("reference", 0, 1, ops, [Storage(numel * 4, True)])
    return spaces, Layout(spaces, Program([trace], [{}]), 0, Repeats(Forms(), trace))


def ref_of(t: torch.Tensor) -> TensorRef:
    return TensorRef(0, t.storage_offset(), tuple(t.shape), t.stride(), "float32")


def views(rng: random.Random, t: torch.Tensor) -> list[torch.Tensor]:
    """What programs make of a tensor: reshapes, slices, selections, transposes, expansions."""
    out = [t]
    for _ in range(rng.randrange(1, 5)):
        v = rng.choice(out)
        k = rng.randrange(v.dim()) if v.dim() else 0
        move = rng.choice(["slice", "select", "transpose", "expand", "view", "step"])
        if not v.dim() or v.numel() < 2:
            continue
        if move == "slice":
            lo = rng.randrange(v.shape[k])
            v = v.narrow(k, lo, rng.randrange(1, v.shape[k] - lo + 1))
        elif move == "select":
            v = v.select(k, rng.randrange(v.shape[k]))
        elif move == "transpose":
            v = v.transpose(k, rng.randrange(v.dim()))
        elif move == "expand":
            v = v.unsqueeze(k).expand(*v.shape[:k], 3, *v.shape[k:])
        elif move == "step" and v.shape[k] % 2 == 0:
            v = v[(slice(None),) * k + (slice(0, None, 2),)]
        elif move == "view" and v.is_contiguous():
            v = v.view(-1, rng.choice([d for d in range(1, v.numel() + 1) if v.numel() % d == 0]))
        out.append(v)
    return out


@pytest.mark.parametrize("seed", range(80))
def test_reduced_references_are_restrictions(seed):
    rng = random.Random(seed)
    t = torch.arange(rng.choice([24, 48, 72, 120]), dtype=torch.float32).view(rng.choice([2, 4, 6]), -1)
    refs = [ref_of(v) for v in views(rng, t)]
    spaces, layout = layout_of(t.numel(), refs)
    for r in refs:
        layout.dims(r)
    spaces.close()
    pinned = {a for p in spaces.pins for a in spaces.atoms(p.space)}
    kept = Kept(spaces, {a: np.arange(spaces.size(a) if a in pinned else rng.randrange(1, spaces.size(a) + 1)) for a in spaces.roots() if spaces.form(a) is None})
    small = t.reshape(-1)[torch.from_numpy(kept.indices(layout.storages[0]))]
    for r in refs:
        new = layout.reduced(r, kept)
        assert layout.restricts(r, new, kept)
        full = t.reshape(-1).as_strided(r.size, r.stride, r.offset)
        for k, s in enumerate(layout.dims(r)):
            full = full.index_select(k, torch.from_numpy(np.ascontiguousarray(kept.indices(s))))
        assert torch.equal(small.as_strided(new.size, new.stride, new.offset), full)


def test_a_matrix_in_rows_and_columns_of_ranks():
    """A column shard and a row shard cut both dimensions; the matrix has the shards' sizes after the reduction."""
    t = torch.arange(96.0).view(8, 12)
    refs = [ref_of(t), ref_of(t[:4]), ref_of(t[:, 6:])]
    spaces, layout = layout_of(96, refs)
    for r in refs:
        layout.dims(r)
    kept = Kept(spaces, {a: np.arange(min(2, spaces.size(a))) for a in spaces.roots() if spaces.form(a) is None})
    assert [layout.reduced(r, kept).size for r in refs] == [(4, 4), (2, 4), (4, 2)]


def test_overlapping_windows_are_pinned():
    t = torch.arange(12.0)
    refs = [ref_of(t), ref_of(t.unfold(0, 4, 2))]
    spaces, layout = layout_of(12, refs)
    for r in refs:
        layout.dims(r)
    assert any("no digits" in p.why for p in spaces.pins)
