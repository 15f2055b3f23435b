"""Planted bugs: programs stay well formed, an oracle says which outputs change, no changed output is ever PROVED; a self-test tells strong specs from weak."""
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from trainverify.diagnose.edit import Edit, applied
from trainverify.diagnose.mutate import Mutator
from trainverify.diagnose.oracle import Oracle
from trainverify.diagnose.score import NotEqual, scored
from trainverify.engine.analysis import analyse
from trainverify.engine.options import Options
from trainverify.ir.check import problems
from trainverify.ir.files import load_program
from trainverify.ir.trace import Program
from trainverify.report.model import SelfTest
from trainverify.verify import capture_spec, verify_dir

SPECS = Path(__file__).parent / "specs"


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """capture(how): the folder of its traces, captured once."""
    made: dict[str, Path] = {}

    def capture(how: str) -> Path:
        if how not in made:
            made[how] = tmp_path_factory.mktemp(how)
            frozen = how == "frozen"
            report = capture_spec(SPECS / f"planted{'_frozen' * frozen}.py", made[how], Options(case={} if frozen else {"how": how}))
            assert report.verdict != "ERROR", report.diagnostics
        return made[how]
    return capture


def programs(folder: Path) -> tuple[Program, Program]:
    return load_program(folder / "reference"), load_program(folder / "parallel")


# ---- well formed

def test_what_was_captured_is_well_formed_and_damage_is_seen(captured):
    reference, parallel = programs(captured("sharded"))
    assert problems(reference) == problems(parallel) == []
    trace = parallel.traces[0]
    index = next(c.index for c in trace.ops if c.collective is not None and c.collective.kind == "all_reduce")
    lost = applied(parallel, Edit({(0, index): None}))
    assert any("ranks [0, 1], [1] come" in said for said in problems(lost))
    read = next(c for c in trace.ops if c.name == "aten.tanh.default")
    beyond = msgspec.structs.replace(read, args=(msgspec.structs.replace(read.args[0], offset=10**6),))
    assert any("ends behind" in said for said in problems(applied(parallel, Edit({(0, read.index): beyond}))))


def test_mutations_follow_from_the_seed_and_none_is_made_twice(captured):
    _, parallel = programs(captured("sharded"))
    first, again, other = ([(m.kind, m.text, m.nodes) for m in Mutator(parallel).mutations(seed, 30)] for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == len(first) == 30
    assert len({kind for kind, _, _ in first}) >= 7
    starts = {t.rank: next(c.index for c in t.ops if c.name == "tv.step") for t in parallel.traces}
    assert all(index > starts[rank] for _, _, nodes in first for rank, index in nodes)


def test_only_the_kinds_that_were_asked_for(captured):
    _, parallel = programs(captured("sharded"))
    found = list(Mutator(parallel).mutations(0, 12, ("collective dropped", "update dropped")))
    assert {m.kind for m in found} == {"collective dropped", "update dropped"}


# ---- the oracle

def test_the_oracle_tells_what_changes_from_what_does_not(captured):
    reference, parallel = programs(captured("sharded"))
    oracle = Oracle(reference, parallel, analyse(reference, parallel), 0)
    assert len(oracle.points) > 1 and oracle.changed(parallel) == set()
    call = next(c for c in parallel.traces[0].ops if c.name == "aten.tanh.default")
    wrong = {(t.rank, call.index): msgspec.structs.replace(call, name="aten.sigmoid.default") for t in parallel.traces}
    assert ("scalar", "loss", 1) in oracle.changed(applied(parallel, Edit(wrong)))
    sums = [c for c in parallel.traces[0].ops if c.name == "aten.add.Tensor"]
    turned = {(0, c.index): msgspec.structs.replace(c, args=tuple(reversed(c.args))) for c in sums}
    assert turned and oracle.changed(applied(parallel, Edit(turned))) == set()       # a + b is b + a


# ---- a whole verification of each mutant

def test_bugs_are_planted_in_equal_programs_only(captured):
    reference, parallel = programs(captured("wrong"))
    with pytest.raises(NotEqual):
        next(scored(reference, parallel, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most", "kernel"), [("sharded", 12, True), ("accumulated", 40, False)])
def test_no_changed_output_is_ever_proved(captured, how, most, kernel):
    found = list(scored(*programs(captured(how)), seed=3, most=most, kernel=kernel))
    assert [s for s in found if s.wrongly] == []
    count = Counter(s.result for s in found)
    assert count["REFUTED"] >= most // 2 and count["UNKNOWN"] <= most // 6 and count["invalid"] <= most // 4, count
    assert all(s.verdict != "REFUTED" for s in found if s.result == "same")


# ---- the self-test

def self_tested(folder: Path) -> SelfTest:
    report = verify_dir(folder, Options(self_test=True, jobs=1, repair=False))
    assert report.self_test is not None and report.exit_code == {"REFUTED": 1, "UNKNOWN": 3, "PROVED": 0}[report.verdict]
    return report.self_test


def test_a_self_test_of_a_program_that_differs_plants_nothing(captured):
    found = self_tested(captured("wrong"))
    assert "differs from its reference" in found.note and found.planted == 0


@pytest.mark.slow
def test_a_self_test_tells_a_strong_spec_from_a_weak_one(captured):
    strong, weak = self_tested(captured("sharded")), self_tested(captured("frozen"))
    assert strong.planted >= 20 and strong.revealed >= 0.8 * strong.planted and strong.unreached == ()
    assert strong.witnessed <= strong.revealed == sum(shown for _, _, shown in strong.kinds) == strong.planted - len(strong.hidden)
    assert all(name.startswith("parameter ") for name in weak.unreached) and len(weak.unreached) == 4     # lr is 0: updates do not show
    assert [b.why for b in weak.hidden if "_fused_adamw_" in b.text] == ["its result is the same here"]                                  # of the weight decay
    assert self_tested(captured("frozen")) == weak
