"""A counterexample as a script of plain PyTorch tensors, which computes the wrong operation on every rank and what the reference has in its
place, prints both, and ends in an assertion that fails (not trusted).

An operation is written as a call only if that call, made here in float64, gives what the replay gave; else its result is written as numbers.
"""
from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch

from trainverify.diagnose.counterexample import Found, output_text
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.expected import Expected, value, where
from trainverify.diagnose.trial import Arguments, result_of
from trainverify.ir.trace import Arg, Name, ScalarRef, Sequence as ListArg, TensorRef

WIDTH = 88
MOST_ELEMENTS = 20_000                        # of the operands of all ranks; of a larger operation only the wrong elements are written
SHOWN = 16
HELPER = '''
def tensor(shape, values):
    """A float64 tensor of zeros but for `values`: position -> number."""
    t = torch.zeros(shape, dtype=torch.float64)
    for at, number in values.items():
        t[at] = number
    return t
'''


def script(found: Found, spec: str) -> str:
    """The text of the script."""
    body = Body(found)
    computed = body.operation() or body.elements()
    text = "\n".join([*_head(found, spec), "import torch", "", HELPER, "", *computed, *_tail()]) + "\n"
    return text.encode("ascii", "backslashreplace").decode()


def _head(found: Found, spec: str) -> list[str]:
    d, told = found.finding.diagnostic, found.told
    place = f"{d.span}" + (f" in {d.span.function}" if d.span.function else "") + f" ({d.span.phase}, step {d.span.step})" if d.span is not None and d.span.file else ""
    parts = [f"Written by trainverify for {spec or 'two functions'}: REFUTED.", f"{d.code}: {d.message}", place, found.finding.algebra,
             f"Output: {output_text(found.key)}. " + (f"{told.nonzero} of {told.elements} float inputs are not zero, found in {told.trials} replays"
                                                     if told.minimised else told.note) + (":" if told.inputs else ".")]
    lines = [line for p in parts if p for line in textwrap.wrap(p, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)]
    inputs = ", ".join(f"{name} = {number}" for name, number in told.inputs) + (", ..." if told.nonzero > len(told.inputs) else "")
    return [*lines, *textwrap.wrap(inputs, WIDTH, initial_indent="#   ", subsequent_indent="#   "), ""]


def _tail() -> list[str]:
    return ['wrong = []',
            'for rank in parallel:',
            '    left, right = parallel[rank].reshape(-1), reference[rank].reshape(-1)',
            '    differ = ~torch.isclose(left, right, rtol=1e-9, atol=1e-12 * right.abs().max().item())',
            '    print(f"rank {rank}: {int(differ.sum())} of {len(left)} elements differ")',
            f'    for at in torch.nonzero(differ).reshape(-1)[:{SHOWN}].tolist():',
            '        print(f"  element {at}: parallel {left[at].item():.9g}, reference {right[at].item():.9g}")',
            '    wrong += [rank] if differ.any() else []',
            'assert not wrong, f"the parallel program differs from the reference on ranks {wrong}"']


class Body:
    """The two sides as source lines."""

    def __init__(self, found: Found):
        self.found, self.outcome = found, found.outcome
        self.flow: Dataflow = found.expectations.flow
        self.lines: list[str] = []
        self.written: dict[tuple, str] = {}

    def operation(self) -> list[str]:
        """The wrong operation on each rank, and what the reference has; [] where it is unknown what that is, or it is too large."""
        nodes = [n for n in self.found.nodes if n[0] in self.found.expected and result_of(self.outcome, "parallel", n) is not None]
        if not nodes or sum(a.numel() for n in nodes for a in self._tensors(n)) > MOST_ELEMENTS:
            return []
        call = self.flow.call(nodes[0])
        name = call.name if call.collective is None else call.collective.kind
        self.lines = [f"# ---- the parallel program: {name}{_at(self.flow, nodes[0])}", "parallel = {}"]
        for n in nodes:
            made = self._collective(n) if call.collective is not None else self._call("parallel", n, self.outcome.arguments.get(("parallel", *n)), f"_{n[0]}")
            self.lines.append(f"parallel[{n[0]}] = {made or self._literal(result_of(self.outcome, 'parallel', n))}")
        self._reference(nodes)
        return [*self.lines, ""]

    def elements(self) -> list[str]:
        """The output's elements on both sides, as the replay gave them."""
        out = [f"# ---- {output_text(self.found.key)}: its elements on both sides, as a replay in float64 gave them", "parallel, reference = {}, {}"]
        for p in self.found.pieces:
            theirs, ours = p.reference["trial"].t.reshape(-1), p.parallel["trial"].t.reshape(-1)
            at = torch.nonzero(where(theirs, ours, 1e-9)).reshape(-1)[:SHOWN] if len(ours) > SHOWN else torch.arange(len(ours))
            if len(at):
                out.append(f"# rank {p.rank}" + (f": elements {at.tolist()} of {len(ours)}" if len(at) < len(ours) else ""))
                out += [f"parallel[{p.rank}] = {self._literal(ours[at])}", f"reference[{p.rank}] = {self._literal(theirs[at])}"]
        return [*out, ""]

    # ---- the reference
    def _reference(self, nodes: list[Node]) -> None:
        self.lines += ["", "# ---- the reference, at the elements that stand in the same places", "reference = {}"]
        for n in nodes:
            e = self.found.expected[n[0]]
            theirs = value(e, self.outcome, self.found.values)
            made = self._reference_call(e)
            at = e.at.tolist()
            if made and -1 not in at:
                whole = at == list(range(self._size(e)))
                self.lines.append(f"reference[{n[0]}] = {made}" + ("" if whole else f".reshape(-1)[{_positions(at)}]"))
            else:
                self.lines.append(f"reference[{n[0]}] = {self._literal(theirs.reshape(result_of(self.outcome, 'parallel', n).shape))}")

    def _size(self, e: Expected) -> int:
        return result_of(self.outcome, "reference", e.place[1:], e.home.target).numel()

    def _reference_call(self, e: Expected) -> str:
        if e.place is None:
            return ""
        if e.place not in self.written:
            node = e.place[1:]
            call = self.found.expectations.call(e.home)
            if sum(a.numel() for a in _flat(self._given(e.place))) > MOST_ELEMENTS:
                return ""
            self.lines.append(f"# {call.name}{_at(self.found.expectations.reference, node)}" + (f": {e.how}" if e.how else ""))
            made = self._call("reference", node, self.outcome.arguments.get(e.place), "") if e.home.target == 0 else ""
            if made:
                self.lines.append(f"whole_{node[1]} = {made}")
            self.written[e.place] = f"whole_{node[1]}" if made else ""
        return self.written[e.place]

    # ---- calls
    def _call(self, side: str, node: Node, given: Arguments | None, suffix: str) -> str:
        """A call of the operation on operands that are written before it; "" if it does not give here what the replay gave."""
        if given is None or given.call.collective is not None or not given.call.name.startswith("aten."):
            return ""
        ns, op, overload = given.call.name.split(".")
        writer = _Writer(suffix if side == "parallel" else f"_reference_{node[1]}", self._literal)
        args = [writer.arg(a, v, f"input{i}") for i, (a, v) in enumerate(zip(given.call.args, given.args))]
        kwargs = {k: writer.arg(a, given.kwargs[k], k) for k, a in given.call.kwargs.items()}
        if writer.failed:
            return ""
        got = _evaluated(getattr(getattr(torch.ops.aten, op), overload), [a[1] for a in args], {k: v[1] for k, v in kwargs.items()})
        want = result_of(self.outcome, side, node)
        if got is None or want is None or not _alike(got[0], want):
            return ""
        self.lines += writer.lines
        text = ", ".join([*(a[0] for a in args), *(f"{k}={v[0]}" for k, v in kwargs.items())])
        return f"torch.ops.{ns}.{op}.{overload}({text})" + ("[0]" if got[1] else "")

    def _collective(self, node: Node) -> str:
        """A communication, from what every member gave; "" for one that is not written here or that gives something else."""
        c = self.flow.call(node).collective
        members = self.flow.members(node) if c.kind not in ("send", "recv") else []
        given = [self.outcome.arguments.get(("parallel", *m)) for m in members]
        if len(c.inputs) != 1 or c.listed or any(g is None for g in given) or c.kind not in COLLECTIVES:
            return ""
        inputs = [g.args[0] for g in given]
        text, got = COLLECTIVES[c.kind](c, node[0])([f"input_{m[0]}" for m in members], inputs)
        if got is None or not _alike(got, result_of(self.outcome, "parallel", node)):
            return ""
        for m, v in zip(members, inputs):
            if ("input", m) not in self.written:
                self.written[("input", m)] = f"input_{m[0]}"
                self.lines.append(f"input_{m[0]} = {self._literal(v)}")
        return text

    def _given(self, place) -> list:
        held = self.outcome.arguments.get(place)
        return [] if held is None else [*held.args, *held.kwargs.values()]

    def _tensors(self, node: Node) -> list[torch.Tensor]:
        return _flat(self._given(("parallel", *node)))

    def _literal(self, t: torch.Tensor) -> str:
        return literal(t)


class _Writer:
    """Arguments as source, each float tensor a line of its own; the values beside the text."""

    def __init__(self, suffix: str, written: Callable[[torch.Tensor], str]):
        self.suffix, self.written = suffix, written
        self.lines: list[str] = []
        self.failed = False

    def arg(self, a: Arg, v, name: str) -> tuple[str, object]:
        if isinstance(v, torch.Tensor) and isinstance(a, (TensorRef, ScalarRef)):
            return self._tensor(a, v, name)
        if isinstance(a, ListArg):
            items = [self.arg(x, y, f"{name}_{i}") for i, (x, y) in enumerate(zip(a.items, v))]
            return "[" + ", ".join(t for t, _ in items) + "]", [y for _, y in items]
        if isinstance(a, Name):
            return self._name(a)
        if a is None or isinstance(a, (bool, int, float, str)):
            return (f'float("{a}")' if isinstance(a, float) and a in (float("inf"), float("-inf")) or a != a else repr(a)), a
        self.failed = True
        return "", None

    def _tensor(self, a: TensorRef | ScalarRef, v: torch.Tensor, name: str) -> tuple[str, object]:
        if isinstance(a, ScalarRef):
            return repr(float(v)), float(v)
        if a.dtype == "bool":
            v = v != 0
        variable = f"{name}{self.suffix}"
        self.lines.append(f"{variable} = {self.written(v)}")
        return variable, v.clone()

    def _name(self, a: Name) -> tuple[str, object]:
        if a.kind == "dtype":
            dtype = getattr(torch, a.value)
            return ("torch.float64", torch.float64) if dtype.is_floating_point else (f"torch.{a.value}", dtype)
        if a.kind == "device":
            return 'torch.device("cpu")', torch.device("cpu")
        if a.kind in ("layout", "memory_format"):
            return f"torch.{a.value}", getattr(torch, a.value)
        if a.kind == "generator":
            return "None", None
        self.failed = True
        return "", None


def literal(t: torch.Tensor) -> str:
    """A tensor as source: every element, or those that are not zero where most are."""
    if not t.dtype.is_floating_point:
        return f"torch.tensor({t.tolist()}, dtype={t.dtype})"
    t = t.double()
    filled = torch.nonzero(t)
    if t.dim() and len(filled) * 4 <= t.numel() or t.numel() == 0:
        return f"tensor({tuple(t.shape)}, {{" + ", ".join(f"{tuple(at)}: {_float(float(t[tuple(at)]))}" for at in filled.tolist()) + "})"
    return f"torch.tensor({_nested(t.tolist())}, dtype=torch.float64)"


def _nested(x) -> str:
    return "[" + ", ".join(_nested(y) for y in x) + "]" if isinstance(x, list) else _float(x)


def _float(x: float) -> str:
    return repr(x) if x - x == 0 else f'float("{x}")'


def _positions(at: Sequence[int]) -> str:
    return f"{at[0]}:{at[-1] + 1}" if list(at) == list(range(at[0], at[-1] + 1)) else str(list(at))


def _flat(x) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in _flat(y)] if isinstance(x, list) else []


def _at(flow: Dataflow, node: Node) -> str:
    span = flow.span(node)
    return "" if span is None or not span.file else f" at {span}" + (" (backward)" if span.phase == "backward" else "")


def _evaluated(op, args: list, kwargs: dict) -> tuple[torch.Tensor, bool] | None:
    """(the first result, whether there are several), None where torch refuses these arguments in float64: then numbers are written."""
    try:
        got = op(*args, **kwargs)
    except (RuntimeError, TypeError):         # a kernel that lacks this type; an overload that lacks these arguments
        return None
    if isinstance(got, (tuple, list)):
        return (got[0], True) if got and isinstance(got[0], torch.Tensor) else None
    return (got, False) if isinstance(got, torch.Tensor) else None


def _alike(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.numel() == want.numel() and torch.allclose(got.double().reshape(-1), want.reshape(-1), rtol=1e-9, atol=1e-12, equal_nan=True)


# ---- communications: from the members' inputs to the text and the value of what this rank gets
def _reduced(c, rank: int):
    def make(names: list[str], inputs: list[torch.Tensor]):
        how = {"sum": "sum(0)", "avg": "mean(0)", "max": "amax(0)", "min": "amin(0)"}.get(c.reduce_op)
        if how is None:
            return "", None
        total = torch.stack(inputs)
        done = {"sum(0)": total.sum, "mean(0)": total.mean, "amax(0)": total.amax, "amin(0)": total.amin}[how](0)
        text = f"torch.stack([{', '.join(names)}]).{how}"
        if c.kind == "all_reduce":
            return text, done
        me, n = c.group.index(rank), len(c.group)
        return f"{text}.reshape(-1).chunk({n})[{me}]", done.reshape(-1).chunk(n)[me]
    return make


def _gathered(c, rank: int):
    def make(names: list[str], inputs: list[torch.Tensor]):
        return f"torch.cat([{', '.join(f'{n}.reshape(-1)' for n in names)}])", torch.cat([v.reshape(-1) for v in inputs])
    return make


def _from_root(c, rank: int):
    def make(names: list[str], inputs: list[torch.Tensor]):
        at = c.group.index(c.root)
        return names[at], inputs[at]
    return make


COLLECTIVES = {"all_reduce": _reduced, "reduce_scatter": _reduced, "all_gather": _gathered, "broadcast": _from_root}
