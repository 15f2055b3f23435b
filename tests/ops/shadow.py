"""Run a PyTorch function, its backward included, with every call evaluated by its row in an algebra, storage by storage."""
from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from harness import EMPTY, TABLE, evaluate, evaluated, execute, is_view, run_with_grad

from trainverify.algebra.base import Complex


class Shadow(TorchDispatchMode):
    """A cell per storage beside torch's own memory. Floats that nothing wrote are data; booleans have a cell if they depend on symbols."""

    def __init__(self, m):
        super().__init__()
        self.m, self.cells, self.alive = m, {}, []

    # ---- memory
    def key(self, t: torch.Tensor) -> int:
        self.alive.append(t)                      # so that no address is used twice
        return t.untyped_storage()._cdata

    def places(self, t: torch.Tensor) -> list[tuple]:
        """Offset, sizes and strides in real elements: one place, or of a complex tensor two."""
        step = 2 if t.is_complex() else 1
        return [(t.storage_offset() * step + part, tuple(t.shape), tuple(s * step for s in t.stride())) for part in range(step)]

    def write(self, t: torch.Tensor, v) -> None:
        key, n = self.key(t), t.untyped_storage().nbytes() // t.element_size() * (2 if t.is_complex() else 1)
        cell = self.cells[key] if key in self.cells else self.m.cell(self.m.const(0, (n,)))
        for place, part in zip(self.places(t), (v.re, v.im) if isinstance(v, Complex) else (v,), strict=True):
            cell = self.m.store(cell, *place, part)
        self.cells[key] = cell

    def read(self, t: torch.Tensor):
        key = self.key(t)
        if key not in self.cells and not t.is_floating_point() and not t.is_complex():
            return t
        if key not in self.cells:
            flat = torch.empty(0, dtype=t.real.dtype).set_(t.untyped_storage())
            self.cells[key] = self.m.cell(self.m.data(flat.clone()))
        parts = [self.m.load(self.cells[key], *place) for place in self.places(t)]
        if not t.is_complex():
            return parts[0]
        return Complex(parts[0], self.m.neg(parts[1]) if t.is_conj() else parts[1])

    def values(self, tree):
        return tree_map(lambda x: self.read(x) if isinstance(x, torch.Tensor) else x, tree)

    # ---- execution
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = self.values(args), self.values(kwargs)
        out, call = execute(func, args, kwargs)
        symbolic = any(isinstance(a, torch.Tensor) and a.dtype == torch.bool and self.key(a) in self.cells for a in args)
        if call.base not in EMPTY and (evaluated(call) or symbolic and not is_view(call.op)):
            for t, v in zip(call.live, evaluate(self.m, TABLE(), call, *before)):
                if v is not None and not isinstance(v, torch.Tensor) and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
                    self.write(t, v)
        return out


def point(i: int, shape) -> torch.Tensor:
    """Where input i is recorded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def shadowed(m, fn, shapes: list[tuple[int, ...]], grad: bool = True) -> tuple[list, list[torch.Tensor]]:
    """fn's outputs and gradients in the algebra and in torch; inputs are symbols, the same on every call."""
    inputs, first = [], 1
    mode = Shadow(m)
    for i, shape in enumerate(shapes):
        t = point(i, shape).requires_grad_()
        mode.write(t.detach(), m.reshape(m.symbols(f"x{i}", first, t.numel()), shape))
        first += t.numel()
        inputs.append(t)
    with mode:
        outs = run_with_grad(fn, inputs, grad)
        with _disable_current_modes():
            return [mode.read(t.detach()) for t in outs], [t.detach().clone() for t in outs]
