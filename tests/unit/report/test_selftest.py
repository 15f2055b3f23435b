"""A self-test as text and as JSON."""
import json

from trainverify.report import json_, schema, text
from trainverify.report.model import PlantedBug, Report, SelfTest

from .validate import problems

FOUND = SelfTest(
    40, 37, 35, (("collective dropped", 5, 5), ("other factor", 6, 3)),
    (PlantedBug("other factor", "0.05 instead of 0.1 in aten.mul.Tensor", "train.py:12", (0, 1), "its result is the same here"),
     *[PlantedBug("update dropped", "aten.add_.Tensor dropped", "train.py:30", (r,), "it changes a value that is zero here") for r in range(15)]),
    ("gradient layers.0.wq.weight", "gradient layers.1.wq.weight", "state layers.0.wq.weight::exp_avg"), 60, 90_000)


def rendered(found: SelfTest) -> str:
    return text.render(Report("PROVED", "spec.py", self_test=found))


def test_says_the_share_what_stays_hidden_and_what_is_out_of_reach():
    told = rendered(FOUND)
    assert "self-test: 37 of 40 planted bugs would show (92%), 35 of them with a" in told
    assert "other factor 3 of 6" in told and "collective dropped" not in told
    assert "train.py:12: 0.05 instead of 0.1 in aten.mul.Tensor (ranks 0-1): its\n        result is the same here" in told and "and 4 more" in told
    assert "3 of 60 outputs cannot show a bug here" in told and "gradient: layers.0-1.wq.weight" in told
    assert max(map(len, told.split("\n"))) <= 80 and told.isascii()


def test_a_program_that_differs_gets_no_bugs():
    assert "self-test: the program itself differs" in rendered(SelfTest(note="the program itself differs from its reference: mend it first"))
    assert "self-test" not in text.render(Report("PROVED", "spec.py"))


def test_reads_back_and_fits_the_schema():
    report = Report("PROVED", "spec.py", self_test=FOUND)
    assert json_.decode(json_.encode(report)) == report
    rule = schema.schema()
    assert problems(json.loads(json_.encode(report)), rule, rule["$defs"]) == []
