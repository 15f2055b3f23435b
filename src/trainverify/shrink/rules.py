"""The shape rule of each operation: which of its dimensions have the same indices (trusted).

A rule says of each dimension of a result from which dimensions of the arguments it comes. An operation without a rule, and a call that
its rule does not understand, pins every dimension that it touches. Where an operation divides by a count that is no
argument of it, `counts.py` writes the count out, or the rule pins what is counted.
"""
from __future__ import annotations

from collections.abc import Callable

from trainverify.ir.trace import Sequence, TensorRef, inputs, references
from trainverify.ops.table import OpTable
from trainverify.shrink.facts import Facts, Undecoded, base, ints, refs
from trainverify.shrink.fused import FUSED
from trainverify.shrink.repeat import is_float, item
from trainverify.shrink.spaces import ONE, Spaces

RULES: dict[str, Callable[[Facts], None]] = {}

CREATION = {"_local_scalar_dense", "is_nonzero", "equal", "zeros", "ones", "full", "empty", "empty_strided", "empty_permuted", "new_zeros", "new_ones", "new_full", "new_empty",
            "new_empty_strided", "scalar_tensor", "arange", "_efficientzerotensor"}
RANDOM = {"normal", "uniform", "random", "bernoulli", "exponential", "cauchy", "log_normal", "geometric", "rand", "randn", "randint", "randperm", "normal_functional"}
LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"}
NOT_POINTWISE = {"glu", "glu_backward", "eye", "linspace", "logspace"}
SOFTMAX = {"_softmax", "_safe_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "cumsum"}
OPTIMIZERS = {"_fused_adamw", "_fused_adam", "_fused_sgd", "_fused_adagrad", "_foreach_addcmul", "_foreach_addcdiv", "_foreach_copy"}
REDUCTIONS = {"sum": 1, "nansum": 1, "mean": 1, "amax": 1, "amin": 1, "logsumexp": 1, "all": 1, "any": 1, "prod": 1, "linalg_vector_norm": 2, "norm": 2,
              "count_nonzero": 1}
COUNTING = {"var": 1, "var_mean": 1, "std": 1, "std_mean": 1}            # divide by a count that nothing else says
CHOICES = {"sort": 1, "argsort": 1, "argmax": 1, "argmin": 1, "median": 1, "mode": 1, "kthvalue": 2, "cummax": 1, "cummin": 1, "max": 1, "min": 1}


def rule(*names: str):
    def keep(fn):
        RULES.update(dict.fromkeys(names, fn))
        return fn
    return keep


def find(name: str, table: OpTable) -> Callable[[Facts], None] | None:
    """The rule of an operation."""
    op = base(name)
    if found := RULES.get(op) or FUSED.get(op):
        return found
    if op.startswith("_foreach_") and op not in OPTIMIZERS:
        inner = _kind(op[9:], table)
        return None if inner is None else foreach(inner) if inner is pointwise else each_reduced if inner is reduction else None
    return _kind(op, table)


def _kind(op: str, table: OpTable) -> Callable[[Facts], None] | None:
    if op in CREATION or op in RANDOM:
        return nothing
    if op in LIKE or op in SOFTMAX:
        return pointwise
    if op in OPTIMIZERS:
        return RULES["_fused_adamw"]
    if op in REDUCTIONS:
        return reduction
    found = table.rows.get(f"aten.{op}")
    return pointwise if found is not None and found.kind == "pointwise" and op not in NOT_POINTWISE and op not in CREATION else None


# ---- elementwise

def nothing(f: Facts) -> None:
    """What is created takes its sizes from its uses."""


def pointwise(f: Facts) -> None:
    """Results and arguments broadcast."""
    whole = f.dims(f.out())
    for ref in f.call.targets()[1:]:
        f.alike(f.dims(ref), whole)
    for ref in inputs(f.call):
        f.broadcast(f.dims(ref), whole)


def foreach(inner: Callable) -> Callable[[Facts], None]:
    """One operation for each element of the lists; a tensor beside them is a scalar."""
    def rule(f: Facts) -> None:
        lists = [refs(a) for a in f.call.args if isinstance(a, Sequence) and any(isinstance(x, TensorRef) for x in a.items)]
        outs = f.call.targets()
        for k, out in enumerate(outs):
            for one in lists:
                if len(one) != len(outs):
                    raise Undecoded("lists of different lengths")
                if one[k] is not None:
                    f.broadcast(f.dims(one[k]), f.dims(out))
    return rule


def each_reduced(f: Facts) -> None:
    """_foreach_norm and its like: every result is a scalar."""
    if any(out.numel != 1 for out in f.call.targets()):
        raise Undecoded("a result is no scalar")


@rule("_fused_adamw")
def optimizers(f: Facts) -> None:
    """Lists of parameters, gradients and states, one by one."""
    lists = [refs(a) for a in f.call.args if isinstance(a, Sequence) and any(isinstance(x, TensorRef) for x in a.items)]
    for k, param in enumerate(lists[0]):
        for other in lists[1:]:
            if len(other) > k and other[k] is not None and other[k].numel != 1:
                f.alike(f.dims(other[k]), f.dims(param))


@rule("triu", "tril")
def triangle(f: Facts) -> None:
    """The order of indices decides: both dimensions have the same ones."""
    x = f.dims(f.tensor(0))
    f.alike(f.dims(f.out()), x)
    if f.spaces.size(x[-1]) == f.spaces.size(x[-2]) and f.arg(1, "diagonal", 0) in (-1, 0, 1):
        f.same(x[-1], x[-2])
    else:
        for s in x[-2:]:
            f.pin(s, "a triangle of two different dimensions, or beside the diagonal")


# ---- reductions

def reduction(f: Facts) -> None:
    """Some dimensions go."""
    _reduce(f, REDUCTIONS[base(f.call.name).removeprefix("_foreach_")])


def _reduce(f: Facts, at: int) -> tuple[int, ...]:
    x = f.tensor(0)
    given = f.arg(at, "dim")
    if isinstance(given, (bool, float)):
        given = None
    gone = {d % len(x.size) for d in ints(given)} if given is not None and x.size else set()
    gone = gone or set(range(len(x.size)))
    left = [s for k, s in enumerate(f.dims(x)) if k not in gone]
    for out in f.call.targets():
        dims = f.dims(out)
        if len(dims) == len(x.size):
            dims = [s for k, s in enumerate(dims) if k not in gone]
        f.alike(dims, left)
    return tuple(s for k, s in enumerate(f.dims(x)) if k in gone)


@rule(*COUNTING)
def counting(f: Facts) -> None:
    """Reductions that divide by how many there are."""
    for s in _reduce(f, COUNTING[base(f.call.name)]):
        f.pin(s, f"{base(f.call.name)} divides by its size")


@rule(*CHOICES)
def choice(f: Facts) -> None:
    """What is chosen among stays as it is."""
    if base(f.call.name) in ("max", "min") and len(f.call.args) == 1:
        return
    if isinstance(f.arg(1), TensorRef):
        return pointwise(f)
    if base(f.call.name) in ("sort", "argsort") and not any(is_float(r) for r in references(f.call)) and f.known(f.tensor(0)) is not None:
        return None                           # an order that integers have: what it puts in order says so (Facts.picked)
    if base(f.call.name) in ("max", "min") and not f.is_read(f.out(1)):       # nobody asks which one it is
        return _reduce(f, 1)
    x = f.tensor(0)
    place = CHOICES[base(f.call.name)]
    if f.call.name.endswith(".stable"):
        place = 2
    k = f.axis(place, len(x.size), -1)
    f.pin(f.dims(x)[k], f"{base(f.call.name)} chooses among it")
    for out in f.call.targets():
        dims = f.dims(out)
        for j, s in enumerate(f.dims(x)):
            if len(dims) == len(x.size) and (j != k or f.spaces.size(dims[j]) == f.spaces.size(s)):
                f.same(dims[j], s)
            elif len(dims) < len(x.size) and j != k:
                f.same(dims[j - (j > k)], s)


@rule("topk")
def topk(f: Facts) -> None:
    """The k largest of a dimension."""
    x = f.tensor(0)
    k = f.axis(2, len(x.size), -1)
    f.pin(f.dims(x)[k], "topk chooses among it")
    for out in f.call.targets():
        for j, (a, b) in enumerate(zip(f.dims(out), f.dims(x))):
            f.pin(a, "what topk chose") if j == k else f.same(a, b)


# ---- products

@rule("mm")
def mm(f: Facts) -> None:
    """[m, k] @ [k, n]"""
    _product(f, f.tensor(0), f.tensor(1))


@rule("bmm")
def bmm(f: Facts) -> None:
    """[b, m, k] @ [b, k, n]"""
    _product(f, f.tensor(0), f.tensor(1))


@rule("addmm", "baddbmm", "_addmm_activation")
def addmm(f: Facts) -> None:
    """c + a @ b"""
    _product(f, f.tensor(1), f.tensor(2))
    f.broadcast(f.dims(f.tensor(0)), f.dims(f.out()))


def _product(f: Facts, left: TensorRef, right: TensorRef) -> None:
    a, b, o = f.dims(left), f.dims(right), f.dims(f.out())
    f.same(a[-1], b[-2])
    f.alike(o[:-2], a[:-2])
    f.alike(o[:-2], b[:-2])
    f.same(o[-2], a[-2])
    f.same(o[-1], b[-1])


@rule("_grouped_mm")
def grouped_mm(f: Facts) -> None:
    """One product for each group of rows ([n, k] @ [g, k, m]), or one for each group of what is added over ([m, n] @ [n, k])."""
    a, b, o, ends = f.dims(f.tensor(0)), f.dims(f.tensor(1)), f.dims(f.out()), f.tensor(2)
    known = f.known(ends)
    if known is None or len(a) != 2:
        raise Undecoded("groups of rows that are not known")
    rows, groups = (a[0], b[0]) if len(b) == 3 else (a[1], o[0])
    if len(b) == 3:
        f.same(a[1], b[1])
        f.alike(o, (a[0], b[2]))
    else:
        f.same(a[1], b[0])
        f.alike(o[1:], (a[0], b[1]))
    f.notes.multiples += [(s, 16 // item(f.tensor(0).dtype)) for s in (o[-1], a[1] if len(b) == 3 else a[0])]      # the kernel wants rows of 16 bytes
    f.pin(groups, "its groups are told apart", structural=True)
    f.same(f.dims(ends)[0], groups)
    start = 0
    for end in known.tolist():
        if end > start:
            f.spaces.segment(rows, start, end)
        start = end


@rule("mv", "dot", "vdot")
def mv(f: Facts) -> None:
    """[..., k] @ [k]"""
    a, b = f.dims(f.tensor(0)), f.dims(f.tensor(1))
    f.same(a[-1], b[0])
    f.alike(f.dims(f.out()), a[:-1])


@rule("ger", "outer")
def outer(f: Facts) -> None:
    """[m] x [n]"""
    f.alike(f.dims(f.out()), (*f.dims(f.tensor(0)), *f.dims(f.tensor(1))))


# ---- movement

@rule("cat")
def cat(f: Facts) -> None:
    """One after the other."""
    given = [r for r in refs(f.arg(0)) if r is not None and r.size != (0,)]
    out = f.dims(f.out())
    k = f.axis(1, len(out), 0)
    _side_by_side(f, out, [f.dims(r) for r in given], k)


def _side_by_side(f: Facts, whole, parts, k: int) -> None:
    for p in parts:
        for j, s in enumerate(p):
            if j != k:
                f.same(s, whole[j])
    f.chunks(whole[k], [p[k] for p in parts])


@rule("stack")
def stack(f: Facts) -> None:
    """Along a new dimension, whose indices are told apart."""
    out = list(f.dims(f.out()))
    k = f.axis(1, len(out), 0)
    f.pin(out.pop(k), "what is stacked", structural=True)
    for r in refs(f.arg(0)):
        f.alike(f.dims(r), out)


@rule("split_with_sizes_copy", "split_copy", "split_with_sizes", "split", "fsdp.split_with_sizes_copy", "unsafe_split", "unsafe_split_with_sizes")
def split(f: Facts) -> None:
    """The parts of one dimension."""
    x = f.dims(f.tensor(0))
    _side_by_side(f, x, [f.dims(r) for r in f.call.targets()], f.axis(2, len(x), 0))


@rule("repeat")
def repeat(f: Facts) -> None:
    """Each dimension several times."""
    x, out, times = f.dims(f.tensor(0)), f.dims(f.out()), ints(f.arg(1))
    x = (ONE,) * (len(out) - len(x)) + tuple(x)
    for n, a, o in zip(times, x, out):
        many = f.spaces.new(n)
        f.pin(many, "a number of repetitions", structural=True)
        f.spaces.product(o, (many, a))


@rule("constant_pad_nd")
def pad(f: Facts) -> None:
    """Padding before and after; negative padding cuts off."""
    x, out, pads = f.dims(f.tensor(0)), f.dims(f.out()), ints(f.arg(1))
    for k, (a, o) in enumerate(zip(reversed(x), reversed(out))):
        left, right = (pads[2 * k], pads[2 * k + 1]) if 2 * k < len(pads) else (0, 0)
        m, n = f.spaces.size(a), f.spaces.size(o)
        f.same(f.spaces.segment(a, max(0, -left), m - max(0, -right)), f.spaces.segment(o, max(0, left), n - max(0, right)))


@rule("slice_backward")
def slice_backward(f: Facts) -> None:
    """A slice of zeros is written."""
    g, out = f.dims(f.tensor(0)), f.dims(f.out())
    k = f.axis(2, len(out))
    start, step = f.arg(3, "start", 0), f.arg(5, "step", 1)
    if not isinstance(start, int) or not isinstance(step, int) or step < 1:
        raise Undecoded("a place that is no number")
    n = f.spaces.size(out[k])
    first = min(n, start + n if start < 0 else start)
    if step == 1:
        f.same(f.spaces.segment(out[k], first, first + f.spaces.size(g[k])), g[k])
    else:
        stepped(f.spaces, out[k], first, step, g[k])
    for j in range(len(out)):
        if j != k:
            f.same(g[j], out[j])


def stepped(spaces: Spaces, whole: int, first: int, step: int, taken: int) -> tuple[int, int]:
    """taken: every step-th index of a part of whole. The part, and where it starts."""
    n = spaces.size(taken)
    start = next((s for s in range(first, max(-1, first - step), -1) if s >= 0 and s + n * step <= spaces.size(whole)), None)
    if start is None:
        raise Undecoded("a step that does not divide what it steps through")
    part, group = spaces.segment(whole, start, start + n * step), spaces.new(step)
    spaces.product(part, (taken, group))
    spaces.segment(group, first - start, first - start + 1)
    return part, start


@rule("select_backward")
def select_backward(f: Facts) -> None:
    """One index of zeros is written."""
    g, out = list(f.dims(f.tensor(0))), f.dims(f.out())
    k = f.axis(2, len(out))
    at = f.axis(3, f.spaces.size(out[k]), name="index")
    f.spaces.segment(out[k], at, at + 1)
    g.insert(k, out[k])
    f.alike(g, out)


@rule("fsdp.all_gather_copy_in")
def all_gather_copy_in(f: Facts) -> None:
    """Flat shards, one after the other, into this rank's part of a buffer."""
    part, whole = f.call.targets()[:2]
    sizes, per_rank, rank = ints(f.arg(2)), f.arg(3), f.arg(4)
    if part.numel != per_rank or sum(sizes) != per_rank or whole.numel % per_rank:
        raise Undecoded("sizes that do not fill the part")
    for k in range(whole.numel // per_rank):
        f.notes.ties.append((f.spaces.segment(f.layout.flat(whole), k * per_rank, (k + 1) * per_rank), f.layout.flat(part)))
    f.chunks(f.layout.flat(part), [f.layout.flat(r) for r in refs(f.arg(0))])


@rule("fsdp.chunk_cat", "_chunk_cat")
def chunk_cat(f: Facts) -> None:
    """Each tensor in num_chunks padded pieces of dimension 0; row r of the result has the r-th piece of each."""
    given, dim, n = refs(f.arg(0)), f.arg(1), f.arg(2)
    out = f.out()
    if dim != 0 or len(out.size) != 2 or out.size[0] != n:
        raise Undecoded("another form than FSDP uses")
    s, pieces = f.spaces, []
    many = f.dims(out)[0]
    f.pin(many, "a number of ranks", structural=True)
    for r in given:
        dims = f.dims(r)
        rows = -(-r.size[0] // n)
        piece, padded = s.new(rows), s.new(n * rows)
        s.product(padded, (many, piece))
        f.same(s.segment(padded, 0, r.size[0]), dims[0])
        flat = s.new(rows * (r.numel // r.size[0]))
        s.product(flat, (piece, *dims[1:]))
        pieces.append(flat)
    f.chunks(f.dims(out)[1], pieces)


# ---- indices

@rule("embedding")
def embedding(f: Facts) -> None:
    """Rows of a table."""
    table, index, out = f.tensor(0), f.tensor(1), f.dims(f.out())
    f.alike(out, (*f.dims(index), f.dims(table)[1]))
    f.domain(index, f.dims(table)[0])


@rule("embedding_dense_backward")
def embedding_backward(f: Facts) -> None:
    """Rows are added up."""
    if f.arg(3) not in (-1, None) or f.arg(4, default=False):
        raise Undecoded("padding_idx or a scale by frequency")
    grad, index, out = f.dims(f.tensor(0)), f.tensor(1), f.dims(f.out())
    f.alike(grad, (*f.dims(index), out[1]))
    f.domain(index, out[0])


@rule("gather")
def gather(f: Facts) -> None:
    """out[i][j] = x[i][index[i][j]]"""
    x, index = f.dims(f.tensor(0)), f.tensor(2)
    k = f.axis(1, len(x))
    f.alike(f.dims(f.out()), f.dims(index))
    _along(f, f.dims(index), x, k)
    f.domain(index, x[k])


@rule("scatter_add", "scatter")
def scatter(f: Facts) -> None:
    """out[i][index[i][j]] = src[i][j]"""
    x, index = f.dims(f.tensor(0)), f.tensor(2)
    k = f.axis(1, len(x))
    f.alike(f.dims(f.out()), x)
    _along(f, f.dims(index), x, k)
    f.domain(index, x[k])
    if isinstance(f.arg(3), TensorRef):
        f.alike(f.dims(f.arg(3)), f.dims(index))


@rule("torchtitan.deterministic_scatter_add")
def scatter_rows(f: Facts) -> None:
    """out[index[i][j]][j] += src[i][j]"""
    x, index = f.dims(f.tensor(0)), f.tensor(1)
    f.alike(f.dims(f.out()), x)
    _along(f, f.dims(index), x, 0)
    f.domain(index, x[0])
    f.alike(f.dims(f.tensor(2)), f.dims(index))


def _along(f: Facts, index, x, k: int) -> None:
    """All but dimension k of an index are the first indices of the tensor's."""
    for j, (a, b) in enumerate(zip(index, x)):
        if j != k:
            f.same(a, f.spaces.segment(b, 0, f.spaces.size(a)))


@rule("index_select")
def index_select(f: Facts) -> None:
    """Some indices of one dimension."""
    x, index, out = f.dims(f.tensor(0)), f.tensor(2), f.dims(f.out())
    k = f.axis(1, len(x))
    f.alike(out, (*x[:k], *(f.dims(index) or (ONE,)), *x[k + 1:]))
    f.domain(index, x[k])
    f.picked(out[k], x[k], index)


@rule("index_add")
def index_add(f: Facts) -> None:
    """Added at some indices of one dimension."""
    x, index, source = f.dims(f.tensor(0)), f.tensor(2), f.dims(f.tensor(3))
    k = f.axis(1, len(x))
    f.alike(f.dims(f.out()), x)
    f.alike(source, (*x[:k], *(f.dims(index) or (ONE,)), *x[k + 1:]))
    f.domain(index, x[k])
    f.picked(source[k], x[k], index)


@rule("index", "_unsafe_index")
def index(f: Facts) -> None:
    """x[i, j]: integer indices of neighbouring dimensions."""
    f.alike(f.dims(f.out()), _indexed(f, f.dims(f.tensor(0)), refs(f.arg(1))))


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(f: Facts) -> None:
    """x[i, j] = values, or x[mask] = number"""
    x, at, values = f.dims(f.tensor(0)), refs(f.arg(1)), f.tensor(2)
    f.alike(f.dims(f.out()), x)
    if any(r is not None and r.dtype in ("bool", "uint8") for r in at):
        if len(at) != 1 or values.numel != 1:
            raise Undecoded("how many elements a mask selects depends on data")
        f.alike(f.dims(at[0]), x[:len(at[0].size)])
    else:
        f.broadcast(f.dims(values), _indexed(f, x, at))


def _indexed(f: Facts, x, at: list[TensorRef | None]) -> list[int]:
    used = [k for k, r in enumerate(at) if r is not None]
    if any(at[k].dtype in ("bool", "uint8") for k in used):
        raise Undecoded("how many elements a mask selects depends on data")
    if not used or used != list(range(used[0], used[-1] + 1)):
        raise Undecoded("indices of dimensions that are no neighbours")
    shape = max((at[k].size for k in used), key=lambda s: (len(s), sum(s)))
    whole = [f.dims(at[k]) for k in used if at[k].size == shape][0]
    for k in used:
        f.broadcast(f.dims(at[k]), whole)
        f.domain(at[k], x[k])
    if len(used) == 1 and len(whole) == 1:
        f.picked(whole[0], x[used[0]], at[used[0]])
    return [*x[:used[0]], *whole, *x[used[-1] + 1:]]
