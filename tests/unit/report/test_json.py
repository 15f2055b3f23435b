"""The JSON report: it is what its schema says, reads back as it was, and the committed schema is the generated one."""
import json
import math

import pytest
from trainverify.diagnostics import Span
from trainverify.report import json_, schema
from trainverify.report.model import Report, Suite

from . import reports
from .validate import problems


@pytest.mark.parametrize("name", reports.ALL)
def test_report_fits_the_schema_and_reads_back(name):
    report = reports.ALL[name]()
    data = json_.encode(report)
    rule = schema.schema()
    assert problems(json.loads(data), rule, rule["$defs"]) == []
    assert json_.decode(data) == report


def test_the_schema_refuses_what_is_not_a_report():
    rule = schema.schema()
    good = json.loads(json_.encode(reports.refuted()))
    span = good["findings"][0]["diagnostic"]["span"]
    for holder, key, bad in ((good, "verdict", "PASSED"), (good, "exit_code", 2), (good, "steps", "2"), (span, "line", None), (good, "surplus", 1)):
        kept = holder.get(key)
        holder[key] = bad
        assert problems(good, rule, rule["$defs"]), (key, bad)
        holder[key] = kept
        if key == "surplus":
            del holder[key]


def test_committed_schemas_are_the_generated_ones():
    for file, made in ((schema.FILE, schema.schema()), (schema.SUITE_FILE, schema.suite_schema())):
        assert file.read_text() == schema.text(made), "run `python -m trainverify.report.schema`"


def test_a_suite_fits_its_schema_and_tells_the_worst():
    suite = Suite([make() for make in reports.ALL.values()], 3.5, "trainverify verify", {"trainverify": "0.1.0"})
    rule = schema.suite_schema()
    plain = json.loads(json_.encode_suite(suite))
    assert problems(plain, rule, rule["$defs"]) == []
    assert plain["verdict"] == "REFUTED" and plain["exit_code"] == 1 and plain["counts"] == {"PROVED": 1, "REFUTED": 1, "UNKNOWN": 4, "ERROR": 2}
    assert plain["reports"][2] == json.loads(json_.encode(reports.refuted()))


def test_spans_are_objects_and_every_field_is_there():
    plain = json.loads(json_.encode(reports.refuted()))
    assert plain["findings"][0]["diagnostic"]["span"]["line"] == 13
    assert set(Report.__struct_fields__) < set(plain)
    assert plain["counts"] == {"PROVED": 0, "REFUTED": 92, "UNKNOWN": 8, "ERROR": 0} and plain["exit_code"] == 1
    assert set(plain["findings"][0]["diagnostic"]["span"]) == set(Span.__struct_fields__)


def test_values_that_json_lacks():
    from trainverify.diagnostics import Diagnostic
    from trainverify.report.model import Finding, Witness
    witness = Witness("loss", float("nan"), ((0, float("inf")), (1, float("-inf"))))
    data = json_.encode(Report(findings=[Finding(Diagnostic("REL010", "NaN"), witnesses=(witness,))]))
    plain = json.loads(data)["findings"][0]["witnesses"][0]
    assert plain["reference"] == "NaN" and plain["parallel"] == [[0, "Infinity"], [1, "-Infinity"]]
    rule = schema.schema()
    assert problems(json.loads(data), rule, rule["$defs"]) == []
    back = json_.decode(data).findings[0].witnesses[0]
    assert math.isnan(back.reference) and back.parallel == ((0, math.inf), (1, -math.inf))
