"""Which of its arguments a call reads, and which it only writes or takes the shape of (trusted; no torch).

`OpCall.digest_in` covers exactly `reads(call)`, in that order; `digest_out` covers `call.targets()`, and for a `tv.wait` the outputs of
the collective that it completes. `digest_out` is 0 where the results are garbage (`makes_garbage`) or still pending.
Uninitialised memory, and memory that a resize adds, is zero in a capture, so that equal programs give equal traces.
"""
from __future__ import annotations

from trainverify.ir.trace import OpCall, TensorRef, tensors

SHAPE_ONLY = frozenset({
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"})

GARBAGE = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})

# Positions of arguments that are written without being read.
OVERWRITTEN = {
    "copy_": (0,), "zero_": (0,), "fill_": (0,), "_foreach_copy_": (0,), "_foreach_zero_": (0,), "normal_": (0,), "uniform_": (0,),
    "random_": (0,), "bernoulli_": (0,), "exponential_": (0,), "cauchy_": (0,), "log_normal_": (0,), "geometric_": (0,),
    "all_gather_copy_in": (1,)}


def unread(name: str) -> tuple[int, ...] | None:
    """Positional arguments of the op `name` that are not read; None: no tensor argument is (they give only a shape)."""
    op = name.split(".")[1]
    if op in SHAPE_ONLY:
        return None
    return OVERWRITTEN.get(op, ())


def makes_garbage(name: str) -> bool:
    """Whether the op's results are uninitialised memory."""
    return name.split(".")[1] in GARBAGE


def reads(call: OpCall) -> tuple[TensorRef, ...]:
    """The tensors whose bytes the call's results depend on, in argument order (keyword arguments last)."""
    if call.collective is not None:
        return call.collective.inputs
    if call.name == "tv.escape":               # integers and masks: what they are is what was decided
        return tuple(t for a in call.args for t in tensors(a) if not t.dtype.startswith(("float", "bfloat", "complex")))
    skip = unread(call.name)
    if skip is None:
        return ()
    found = [t for k, a in enumerate(call.args) if k not in skip for t in tensors(a)]
    # Keyword tensors that a call writes are `out=` arguments.
    found += [t for a in call.kwargs.values() for t in tensors(a) if t not in call.writes]
    return tuple(found)
