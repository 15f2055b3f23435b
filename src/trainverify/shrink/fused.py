"""Shape rules of fused operations: attention, norms and losses (trusted, as `rules.py` is, which looks them up here)."""
from __future__ import annotations

from collections.abc import Callable

from trainverify.ir.trace import TensorRef, inputs
from trainverify.shrink.facts import Facts, Undecoded, base, ints


def attention(f: Facts) -> None:
    """softmax(q k^T * scale) v"""
    q, k, v = (f.dims(f.tensor(i)) for i in range(3))
    out, weights = f.call.targets()[:2]
    _attention(f, q, k, v, f.arg(4, "is_causal", False), f.arg(5, "attn_mask"))
    f.alike(f.dims(out), (*q[:3], v[3]))
    f.alike(f.dims(weights), q[:3])


def attention_backward(f: Facts) -> None:
    """Gradients of attention."""
    grad, q, k, v, out, weights = (f.dims(f.tensor(i)) for i in range(6))
    _attention(f, q, k, v, f.arg(7, "is_causal", False), f.arg(8, "attn_mask"))
    f.alike(grad, (*q[:3], v[3]))
    f.alike(out, grad)
    f.alike(weights, q[:3])
    for made, like in zip(f.call.targets(), (q, k, v)):
        f.alike(f.dims(made), like)


def _attention(f: Facts, q, k, v, causal, mask) -> None:
    f.same(q[0], k[0])
    f.same(q[3], k[3])
    f.alike(k[:3], v[:3])
    f.same(q[3], v[3])                        # the kernel has one head size
    heads, shared = f.spaces.size(q[1]), f.spaces.size(k[1])
    if heads % shared:
        raise Undecoded("a number of query heads that is no multiple of the number of key heads")
    f.spaces.product(q[1], (k[1], f.spaces.new(heads // shared)))
    if causal:
        if f.spaces.size(q[2]) != f.spaces.size(k[2]):
            for s in (q[2], k[2]):
                f.pin(s, "causal attention of two different lengths")
        else:
            f.same(q[2], k[2])
    if isinstance(mask, TensorRef):
        f.broadcast(f.dims(mask), (q[0], q[1], q[2], k[2]))


def nll_loss(f: Facts) -> None:
    """x[i, target[i]] for each i"""
    x, target = f.dims(f.tensor(0)), f.tensor(1)
    _nll(f, x, target, f.arg(2), f.arg(4), f.arg(3))
    if f.out().size:
        f.alike(f.dims(f.out()), x[:-1])


def nll_loss_backward(f: Facts) -> None:
    """The gradient of nll_loss."""
    x, target = f.dims(f.tensor(1)), f.tensor(2)
    _nll(f, x, target, f.arg(3), f.arg(5), f.arg(4))
    f.alike(f.dims(f.out()), x)


def _nll(f: Facts, x, target: TensorRef, weight, ignored, how) -> None:
    if isinstance(weight, TensorRef):
        f.broadcast(f.dims(weight), x[-1:])
        for s in x[:-1] if how == 1 else ():
            f.pin(s, "a weighted mean divides by the weights of its targets")
    f.alike(f.dims(target), x[:-1])
    f.domain(target, x[-1])
    if not isinstance(ignored, int) or 0 <= ignored:
        f.pin(x[-1], "one of its indices is ignored")


def layer_norm(f: Facts) -> None:
    """The last dimensions are normalised."""
    backward = "backward" in f.call.name
    x = f.dims(f.tensor(1 if backward else 0))
    n = len(ints(f.arg(2 if backward else 1)))
    if n == len(x) or len({r.dtype for r in (*inputs(f.call), *f.call.targets())}) > 1:      # counts.py writes the others out
        for s in x[len(x) - n:]:
            f.pin(s, f"{base(f.call.name)} divides by its size")
    for ref in (*inputs(f.call), *f.call.targets()):
        dims = f.dims(ref)
        if ref.size == tuple(f.spaces.size(s) for s in x):
            f.alike(dims, x)
        elif len(dims) == len(x):             # statistics
            f.alike(dims[:len(x) - n], x[:len(x) - n])
        elif len(dims) == n:
            f.alike(dims, x[len(x) - n:])


def loss(f: Facts) -> None:
    """Elementwise; a mean divides by a count that nothing else says."""
    largest = max((r for r in inputs(f.call)), key=lambda r: r.numel)
    whole = f.dims(largest)
    for ref in (*inputs(f.call), *f.call.targets()):
        f.broadcast(f.dims(ref), whole)
    modes = [a for a in f.call.args if isinstance(a, int) and not isinstance(a, bool)]
    if f.call.kwargs.get("reduction", modes[0] if modes else 1) == 1:
        for s in whole:
            f.pin(s, f"{base(f.call.name)} divides by its size")


FUSED: dict[str, Callable[[Facts], None]] = {
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": attention_backward,
    "nll_loss_forward": nll_loss,
    "nll_loss_backward": nll_loss_backward,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "native_layer_norm_backward", "_fused_rms_norm_backward"), layer_norm),
    **dict.fromkeys(("mse_loss", "mse_loss_backward", "smooth_l1_loss", "smooth_l1_loss_backward", "huber_loss", "huber_loss_backward",
                    "binary_cross_entropy", "binary_cross_entropy_backward", "binary_cross_entropy_with_logits"), loss),
}
