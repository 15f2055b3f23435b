"""Conformance of op rows with PyTorch: a row evaluated in float64 (algebra `real`) must give what torch gives.

check_row(op, args, kwargs)      one call of an overload, forward or backward
check_function(fn, inputs)       record every aten call of fn's forward and backward in float64 and check each call's row
check_opinfo(name, ...)          the same on PyTorch's own OpInfo samples
assert_covered(rows)             the last test of each file: every row of its module took part in some check
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from trainverify.algebra.base import Complex
from trainverify.algebra.real import Real
from trainverify.ir.trace import Name, OpCall, Sequence, TensorRef
from trainverify.ops.standard import standard_table
from trainverify.ops.table import OpTable, Rows

torch.set_num_threads(1)
CHECKED: set[str] = set()          # names of rows that took part in a check, for assert_covered
RANDOM = {"aten.bernoulli", "aten.rand", "aten.randn", "aten.normal", "aten.uniform", "aten.random", "aten.rand_like",
          "aten.randn_like", "aten.randint", "aten.randperm", "aten.multinomial", "aten.exponential"}
EMPTY = {"aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided", "aten.resize"}
LEAVES = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.is_same_size", "aten._fused_sdp_choice"}


@dataclass
class Context:
    """What replay hands to rows with ctx=True."""

    call: OpCall
    native: list[torch.Tensor | None]
    recorded: tuple = ()
    decisions: list[tuple] = field(default_factory=list)

    def argument(self, place: int):
        return self.recorded[place]

    def decide(self, kind: str, operands, outcome) -> None:
        self.decisions.append((kind, tuple(operands), outcome))


@dataclass
class Call:
    """One executed call: arguments as they were before it, targets (returned tensors, then written ones) after it."""

    op: torch._ops.OpOverload
    args: tuple
    kwargs: dict
    targets: list[torch.Tensor]
    live: list[torch.Tensor] = field(default_factory=list)     # the targets themselves, not copies

    @property
    def name(self) -> str:
        return str(self.op)

    @property
    def base(self) -> str:
        ns, op = self.name.split(".")[:2]
        return f"{ns}.{op[:-1] if op.endswith('_') and not op.endswith('__') else op}"


# ---- running and recording
def copies(tree):
    return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, tree)


def execute(op, args, kwargs) -> tuple[object, Call]:
    """Run `op` and remember what went in and came out."""
    before = copies((tuple(args), dict(kwargs)))
    out = op(*args, **kwargs)
    found = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
    for arg, value in zip(op._schema.arguments, list(args) + [None] * len(op._schema.arguments)):
        value = kwargs.get(arg.name, value)
        if arg.alias_info is not None and arg.alias_info.is_write:
            found += [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor) and all(t is not f for f in found)]
    return out, Call(op, *before, copies(found), found)


class Recorder(TorchDispatchMode):
    """Every call that replay would evaluate by a row."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, call = execute(func, args, kwargs or {})
        self.calls.append(call)
        return out


def is_view(op) -> bool:
    """Views are not recorded: they share their storage with an input."""
    rets = op._schema.returns
    return str(op).startswith("aten._unsafe_view") or (
        bool(rets) and all(r.alias_info is not None and not r.alias_info.is_write for r in rets))


def evaluated(call: Call) -> bool:
    """Whether replay evaluates the call by its row: it is no view, no fresh garbage, not random, and touches floats."""
    if is_view(call.op) or call.base in EMPTY | RANDOM | LEAVES:
        return False
    tensors = [t for t in tree_flatten((call.args, call.kwargs, call.targets))[0] if isinstance(t, torch.Tensor)]
    return any(t.is_floating_point() or t.is_complex() for t in tensors)


# ---- one call
def _ref(t: torch.Tensor) -> TensorRef:
    return TensorRef(0, t.storage_offset(), tuple(t.shape), tuple(t.stride()), str(t.dtype).removeprefix("torch."))


def _arg(x):
    if isinstance(x, torch.Tensor):
        return _ref(x)
    if isinstance(x, (list, tuple)):
        return Sequence(tuple(_arg(i) for i in x))
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    return Name("opaque", str(x))


def value(m, x):
    """An argument as replay hands it to a row."""
    if isinstance(x, torch.Tensor) and x.is_complex():
        return Complex(m.data(x.real), m.data(x.imag))
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return m.data(x)
    if isinstance(x, (list, tuple)):
        return [value(m, i) for i in x]
    return x


def evaluate(m, table: OpTable, call: Call, args, kwargs) -> list:
    """The row's results for the call's targets, on arguments that are already values of m."""
    found = table.lookup(call.name)
    if found is None:
        raise AssertionError(f"no row for {call.name}")
    kw = {k: v for k, v in kwargs.items() if k != "out"}
    if found.row.ctx:
        outs = Sequence(tuple(_ref(t) for t in call.targets))
        kw["ctx"] = Context(OpCall(0, call.name, tuple(map(_arg, call.args)), {k: _arg(v) for k, v in call.kwargs.items()}, outs),
                            call.targets, call.args)
    if found.foreach:
        from trainverify.ops.foreach import foreach_call
        got = foreach_call(m, found.row, args, kw)
    else:
        got = found.row.meaning(m, *args, **kw)
    got = list(got) if isinstance(got, (list, tuple)) else [got]
    if len(got) != len(call.targets):
        raise AssertionError(f"{call.name}: {len(got)} results for {len(call.targets)} targets")
    CHECKED.add(found.row.name)
    return got


def _close(what: str, got, want: torch.Tensor, rtol: float, atol: float) -> None:
    if tuple(got.shape) != tuple(want.shape):
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, torch gives {tuple(want.shape)}")
    torch.testing.assert_close(got.to(torch.float64), want.to(torch.float64), rtol=rtol, atol=atol, equal_nan=True,
                               msg=lambda text: f"{what}: {text}")


def check_call(call: Call, rtol: float = 1e-9, atol: float = 1e-9, table: OpTable | None = None) -> None:
    """The row's float64 results are those that torch gave."""
    m = Real()
    got = evaluate(m, table or TABLE(), call, value(m, call.args), {k: value(m, v) for k, v in call.kwargs.items()})
    for k, (g, want) in enumerate(zip(got, call.targets)):
        what = f"{call.name} result {k}"
        if g is None or isinstance(g, torch.Tensor):
            if want.is_floating_point() or want.is_complex():
                raise AssertionError(f"{what}: no value for a float result")
        elif want.dtype != torch.bool and not want.is_floating_point() and not want.is_complex():
            continue                                  # integers are replay's: it takes the recorded ones
        elif want.is_complex():
            _close(what, m.to_float(g.re), want.real, rtol, atol)
            _close(what, m.to_float(g.im), want.imag, rtol, atol)
        else:
            _close(what, m.to_float(g), want, rtol, atol)


_table: list[OpTable] = []


def TABLE() -> OpTable:
    if not _table:
        _table.append(standard_table())
    return _table[0]


def check_row(op, args, kwargs=None, *, rtol: float = 1e-9, atol: float = 1e-9) -> Call:
    """Run one overload (torch.ops.aten.add.Tensor) on these arguments and compare its row with it."""
    with torch.no_grad():
        _, call = execute(op, copies(tuple(args)), copies(dict(kwargs or {})))
    check_call(call, rtol, atol)
    return call


# ---- functions, forward and backward
def cotangent(t: torch.Tensor) -> torch.Tensor:
    """A fixed, unsymmetric cotangent."""
    w = torch.arange(1, t.numel() + 1, dtype=torch.float64).reshape(t.shape) / 7 - 0.3
    return w.to(t.dtype)


def differentiable(tree) -> list[torch.Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())]


def run_with_grad(fn, inputs, grad: bool = True) -> list[torch.Tensor]:
    """fn's float outputs, then the gradients of its inputs under the fixed cotangent."""
    out = fn(*inputs)
    outs = differentiable(out)
    live = [t for t in outs if t.requires_grad]
    if not (grad and live):
        return outs
    wrt = [t for t in differentiable(inputs) if t.requires_grad]
    grads = torch.autograd.grad(live, wrt, [cotangent(t) for t in live], allow_unused=True)
    return outs + [g for g in grads if g is not None]


def record(fn, inputs, grad: bool = True) -> list[Call]:
    with Recorder() as rec:
        run_with_grad(fn, inputs, grad)
    return [c for c in rec.calls if evaluated(c)]


def leaf(t: torch.Tensor, grad: bool = True) -> torch.Tensor:
    t = t.detach().clone()
    return t.requires_grad_(grad) if t.is_floating_point() or t.is_complex() else t


def check_function(fn, *inputs, grad: bool = True, flags: bool = False, rtol: float = 1e-9, atol: float = 1e-9) -> list[Call]:
    """Check the row of every call that fn's forward and backward make on float64 `inputs` (any pytrees of tensors).

    All float inputs are differentiated, or with flags=True those that require gradients.
    """
    inputs = tree_map(lambda t: leaf(t, t.requires_grad or not flags) if isinstance(t, torch.Tensor) else t, inputs)
    calls = record(fn, inputs, grad)
    for call in calls:
        check_call(call, rtol, atol)
    return calls


# ---- OpInfo
def opinfo(name: str, variant: str = ""):
    from torch.testing._internal.common_methods_invocations import op_db
    found = [o for o in op_db if o.name == name and o.variant_test_name == variant]
    if not found:
        raise LookupError(f"no OpInfo {name!r} {variant!r}")
    return found[0]


def check_opinfo(name: str, variant: str = "", *, dtype=torch.float64, limit: int = 12, numel: int = 400, grad: bool = True,
                 keep=lambda sample: True, rtol: float = 1e-8, atol: float = 1e-8) -> int:
    """Check all calls made on up to `limit` of PyTorch's samples for an operator; how many samples ran."""
    info, done = opinfo(name, variant), 0
    torch.manual_seed(0)
    for s in info.sample_inputs("cpu", dtype, requires_grad=grad):
        tensors = [t for t in tree_flatten((s.input, s.args, s.kwargs))[0] if isinstance(t, torch.Tensor)]
        if done == limit:
            break
        if any(t.numel() > numel or t.dtype not in (dtype, torch.int64, torch.bool) for t in tensors) or not keep(s):
            continue
        check_function(lambda x, a, k: info.op(x, *a, **k), s.input, s.args, s.kwargs, grad=grad, flags=True,
                       rtol=rtol, atol=atol)
        done += 1
    if not done:
        raise AssertionError(f"no OpInfo sample of {name} was checked")
    return done


def assert_covered(rows: Rows) -> None:
    """Every row of the module was executed by some check (call it in the last test of a file)."""
    missing = sorted(r.name for r in rows.items if r.name not in CHECKED)
    if missing:
        raise AssertionError(f"rows without a check: {missing}")
