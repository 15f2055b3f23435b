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
        move = rng.choice(["slice", "select", "transpose", "expand", "view", "step", "pairs"])
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
        elif move == "pairs" and v.shape[k] > 3:       # the even and the odd ones of a part
            n = 2 * rng.randrange(1, v.shape[k] // 2)
            lo = rng.randrange(v.shape[k] - n + 1)
            part = v.narrow(k, lo, n)
            out.append(part[(slice(None),) * k + (slice(0, None, 2),)])
            v = part[(slice(None),) * k + (slice(1, None, 2),)]
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


def test_every_other_index_of_a_part_is_reduced():
    """The rotary part of a head, whose size is odd: 7 of 15 are left alone, the other 8 are taken apart as 4 pairs."""
    t = torch.arange(90.0).view(6, 15)
    refs = [ref_of(t), ref_of(t[:, :7]), ref_of(t[:, 7::2]), ref_of(t[:, 8::2])]
    spaces, layout = layout_of(90, refs)
    for r in refs:
        layout.dims(r)
    spaces.close()
    assert not spaces.pins
    even, odd = (layout.dims(r)[1] for r in refs[2:])
    assert spaces.find(even) == spaces.find(odd) and spaces.size(even) == 4
    kept = Kept(spaces, {spaces.find(even): np.array([0, 2])})
    assert kept.indices(layout.dims(refs[0])[1]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12]
    assert all(layout.restricts(r, layout.reduced(r, kept), kept) for r in refs)


def test_complex_numbers_are_pairs_of_floats():
    t = torch.arange(48.0).view(4, 6, 2)
    pairs = TensorRef(0, 0, (4, 6), (6, 1), "complex64")
    spaces, layout = layout_of(48, [ref_of(t), pairs])
    for r in (ref_of(t), pairs):
        layout.dims(r)
    spaces.close()
    assert all(p.structural for p in spaces.pins)
    rows, columns = layout.dims(pairs)
    assert [spaces.find(s) for s in layout.dims(ref_of(t))[:2]] == [spaces.find(rows), spaces.find(columns)]
    kept = Kept(spaces, {spaces.find(columns): np.array([1, 4])})
    small = layout.reduced(pairs, kept)
    assert small.size == (4, 2) and small.stride == (2, 1) and layout.restricts(pairs, small, kept)


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
