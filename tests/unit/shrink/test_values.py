"""Made-up values of captures without values behave like those of a model that was just made, however deep it is."""
from pathlib import Path

import numpy as np
import pytest
import torch

from shrink.kit import quiet
from trainverify.algebra.real import Real
from trainverify.capture.session import capture
from trainverify.capture.spec import load_spec
from trainverify.engine.options import Options
from trainverify.ir.trace import OpCall, Program, Storage, TensorRef, Trace
from trainverify.ops.standard import standard_table
from trainverify.relate.compare import Comparison
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.machine import Hooks
from trainverify.replay.run import replay
from trainverify.shrink.reduce import reduce_programs
from trainverify.shrink.values import fill

LLAMA = Path(__file__).resolve().parents[3] / "examples" / "llama_405b.py"


def ref(storage: int, *size: int, dtype: str = "float32") -> TensorRef:
    return TensorRef(storage, 0, size, tuple(int(np.prod(size[k + 1:])) for k in range(len(size))), dtype)


def filled(symbols: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]], table: int = -1, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """(kind, name, recorded size, reduced size) of each -> its values. `table`: that one is an embedding."""
    def program(which: int) -> Program:
        ops = [OpCall(k, "tv.symbol", (s[0], s[1], ref(k, *s[which], dtype=dtype)), {}, None) for k, s in enumerate(symbols)]
        if table >= 0:
            ops.append(OpCall(len(ops), "aten.embedding.default", (ops[table].args[2], ref(90, 3, dtype="int64")), {}, ref(91, 3, symbols[table][which][1], dtype=dtype)))
        return Program([Trace("reference", 0, 1, ops, [Storage(4, True) for _ in ops])], [{}])
    small = program(3)
    fill(small, Program([], []), program(2))
    return {name: torch.from_numpy(small.blobs[0][f"symbol.{name}"]).view(getattr(torch, dtype)).double().reshape(size) for _, name, _, size in symbols}


def test_sizes_are_those_of_a_new_model():
    made = filled([("weight", "embed.weight", (128_256, 16_384), (40, 6)), ("weight", "norm.weight", (16_384,), (6,)), ("weight", "up.weight", (53_248, 16_384), (8, 6)),
                   ("weight", "up.bias", (53_248,), (8,)), ("state", "up.weight::exp_avg_sq", (53_248, 16_384), (8, 6)), ("batch", "x", (9, 9), (5, 4))], table=0)
    size = {name: float(v.square().mean().sqrt()) for name, v in made.items()}
    assert 1 / 256 < size["up.weight"] < 1 / 64 and 0.4 < size["embed.weight"] < 1 and 0.4 < size["x"] < 1 and size["up.bias"] < 0.1
    assert (made["norm.weight"] > 0.4).all() and (made["norm.weight"] <= 2).all() and (made["up.weight::exp_avg_sq"] > 0).all()
    assert (made["up.weight"] < 0).any() and (made["up.weight"] > 0).any()


def test_elements_are_pairwise_different_also_without_their_scale():
    made = filled([("weight", "a.weight", (9000, 4096), (300, 200)), ("weight", "norm.weight", (4096,), (200,)), ("weight", "b.weight", (4096, 70), (200, 30))])
    mantissas = torch.frexp(torch.cat([v.reshape(-1) for v in made.values()]))[0].abs()
    assert len(mantissas.unique()) == len(mantissas) == 66_200
    assert (mantissas * 2 ** 23 != (mantissas * 2 ** 23).round()).all()        # all of a float's digits are used


def test_the_same_again():
    symbols = [("weight", "a.weight", (900, 40), (30, 20))]
    assert torch.equal(filled(symbols)["a.weight"], filled(symbols)["a.weight"])
    assert len(filled(symbols, dtype="bfloat16")["a.weight"].abs().unique()) == 64


@pytest.mark.slow
def test_sixteen_layers_stay_finite_and_of_ordinary_size():
    captured = capture(load_spec(LLAMA), Options(case={"size": "405b", "layers": 16}, steps=1, reduce=True, full_size=True, timeout=600.0), quiet)
    table = standard_table()
    small = reduce_programs(captured.reference, captured.parallel, table)
    symbols, worlds = Symbols(small.reference), []
    real = Real(symbols.real_values)
    for program in (small.reference, small.parallel):
        binder = Binder(symbols, [real])
        worlds.append(replay(program, [real], table, Hooks(symbol=binder.symbol, bind=binder.bind)))
    comparison = Comparison(symbols, [real], *worlds)
    comparison.run()
    assert len(comparison.compared) == 2 * (16 * 9 + 3) + 1
    for key, found in comparison.compared.items():
        for piece in found.pieces:
            reference, parallel = piece.reference["real"].t, piece.parallel["real"].t
            assert 1e-7 < float(reference.abs().max()) < 1e3, key
            torch.testing.assert_close(parallel, reference, rtol=1e-9, atol=1e-12)
