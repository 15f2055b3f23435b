"""Wording helpers: what is folded must still say exactly what it stands for."""
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from trainverify.report.words import fold_names, int_ranges, join_wrapped, number, ranks_text, short_path, short_paths


def unfold(name: str) -> set[str]:
    def numbers(part: str) -> list[str]:
        ranges = part.strip("{}").split(",")
        if not all(r.replace("-", "").isdecimal() for r in ranges):
            return [part]
        return [str(n) for r in ranges for n in range(int(r.split("-")[0]), int(r.split("-")[-1]) + 1)]
    parameter, separator, keys = name.partition("::")
    return {".".join(p) + separator + key for p in product(*map(numbers, parameter.split("."))) for key in keys.strip("{}").split(",")}


component = st.one_of(st.integers(0, 12).map(str), st.sampled_from(["layers", "norm1", "w"]))


@settings(derandomize=True, database=None, max_examples=300)
@given(st.lists(st.tuples(st.lists(component, min_size=1, max_size=4).map(".".join), st.sampled_from(["", "::exp_avg", "::step"])).map("".join), max_size=20))
def test_folding_names_loses_none_and_invents_none(names):
    unfolded = [unfold(n) for n in fold_names(names)]
    assert set().union(*unfolded) == set(names)
    assert sum(map(len, unfolded)) == len(set(names))


def test_folding_names():
    names = [f"layers.{i}.{n}.weight" for i in range(3) for n in ("norm1", "norm2")] + ["norm.weight"]
    assert fold_names(names) == ["layers.0-2.norm1.weight", "layers.0-2.norm2.weight", "norm.weight"]
    assert fold_names([f"a.{i}::{k}" for i in (0, 1) for k in ("exp_avg", "exp_avg_sq")] + ["b::step"]) == ["a.0-1::{exp_avg,exp_avg_sq}", "b::step"]
    assert fold_names(["a.0", "a.2", "a.3"]) == ["a.{0,2-3}"]
    assert fold_names(["a.0.b.0", "a.0.b.1", "a.1.b.0"]) == ["a.0-1.b.0", "a.0.b.1"]


def test_ranks():
    assert int_ranges([5, 0, 1, 2]) == "0-2,5"
    assert [ranks_text(r) for r in ((), (3,), (0, 1, 4), (0, 2, 4))] == ["", "rank 3", "ranks 0-1,4", "ranks 0,2,4"]
    assert ranks_text(range(1, 512, 2)) == "ranks 1-511 by 2" and ranks_text((0, 3, 6, 9)) == "ranks 0-9 by 3"
    assert ranks_text([r for r in range(64) if r % 4 < 2]) == "ranks 0-1,4-5,8-9,12-13,16-17,20-21,24-25,28-29,... (32 of them)"


def test_numbers():
    assert [number(x) for x in (3.0, -0.125, 1e-9, float("nan"), float("-inf"), 1e300)] == ["3", "-0.125", "1e-09", "NaN", "-inf", "1e+300"]


def test_joined_parts_break_only_between_parts():
    assert join_wrapped(["a b", "c" * 9, "d"], " | ", 12) == ["a b |", "  " + "c" * 9 + " |", "  d"]


def test_paths_outside_the_current_folder_stay_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "a" / "b.py")) == "a/b.py"
    assert short_path("/nowhere/c.py") == "/nowhere/c.py"
    assert short_paths(f"at {tmp_path}/a/b.py:3, not at {tmp_path}.bak/c.py") == f"at a/b.py:3, not at {tmp_path}.bak/c.py"
