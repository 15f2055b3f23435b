"""The benchmark of obligations says what the kernel decided."""
import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "bench" / "obligations.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_obligations", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_right_and_wrong(bench):
    rows = bench.measure([(f, n) for f, n in bench.ALL if f.__name__ in ("adamw", "vocab_cross_entropy") and n == 2])
    assert len(rows) == 2
    for row in rows:
        assert row["right"]["settled"] and row["right"]["proved"] == row["right"]["elements"] > 0
        assert row["wrong"]["settled"] and row["wrong"]["refuted"] > 0
    *_, said = bench.table(rows).split("\n")
    assert said.startswith("2 of 2 right ones proved, 2 of 2 wrong ones refuted, ")


def test_a_right_one_in_place_of_the_wrong_one_is_not_settled(bench):
    def same(world, n, wrong):
        x = world.leaf("x")
        return [(x + x, 2 * x)]

    def different(world, n, wrong):
        x = world.leaf("x")
        return [(x + x, 3 * x)]

    (row,) = bench.measure([(same, 2)])
    assert row["right"]["settled"] and not row["wrong"]["settled"] and "NOT SETTLED" in bench.table([row])
    (row,) = bench.measure([(different, 2)])
    assert not row["right"]["settled"] and row["wrong"]["settled"] and "NOT PROVED" in bench.table([row])
