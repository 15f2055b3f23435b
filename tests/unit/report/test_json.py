"""The JSON report: it is what its schema says, reads back as it was, and the committed schema is the generated one."""
import json
import math

import pytest
from trainverify.diagnostics import Span
from trainverify.report import json_, schema
from trainverify.report.model import Report

from . import reports


def problems(value, rule, defs, path="$"):
    """What of `value` breaks a JSON schema rule; knows the keywords that our schema uses and refuses others."""
    unknown = rule.keys() - {"$ref", "$schema", "$defs", "title", "description", "type", "properties", "required", "additionalProperties", "items",
                             "prefixItems", "minItems", "maxItems", "anyOf", "enum", "const"}
    assert not unknown, unknown
    if "$ref" in rule:
        return problems(value, defs[rule["$ref"].removeprefix("#/$defs/")], defs, path)
    if "anyOf" in rule:
        tried = [problems(value, r, defs, path) for r in rule["anyOf"]]
        return [] if any(not t for t in tried) else tried[0]
    if "enum" in rule or "const" in rule:
        return [] if value in rule.get("enum", [rule.get("const")]) else [f"{path}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    if "type" in rule and (not isinstance(value, kinds[rule["type"]]) or (isinstance(value, bool) and rule["type"] != "boolean")):
        return [f"{path}: {value!r} is no {rule['type']}"]
    found = []
    if isinstance(value, dict):
        known = rule.get("properties", {})
        found += [f"{path}: no {k}" for k in rule.get("required", ()) if k not in value]
        for k, v in value.items():
            inner = known.get(k, rule.get("additionalProperties", True))
            found += [f"{path}: surplus {k}"] if inner is False else [] if inner is True else problems(v, inner, defs, f"{path}.{k}")
    if isinstance(value, list):
        for i, v in enumerate(value):
            fixed = rule.get("prefixItems", [])
            inner = fixed[i] if i < len(fixed) else rule.get("items", True)
            found += [f"{path}[{i}]: surplus"] if inner is False else [] if inner is True else problems(v, inner, defs, f"{path}[{i}]")
    return found


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


def test_committed_schema_is_the_generated_one():
    assert schema.FILE.read_text() == schema.text(), "run `python -m trainverify.report.schema`"


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
