"""What to do stands before the details: the repair, or where there is none what a finding of its class is to be looked at for."""
import msgspec
import pytest
from trainverify.diagnostics import Diagnostic
from trainverify.report.advice import _BY_CLASS, advice
from trainverify.report.model import Repair
from trainverify.report.text import render

from .reports import refuted

CLASSES = ("multiple", "partial sum", "permutation", "other tensor", "reweighted", "additive term", "wrong group", "stale", "never updated", "uninitialised", "decision", "other")


@pytest.mark.parametrize("diagnosis", CLASSES)
def test_every_class_has_its_advice(diagnosis):
    finding = msgspec.structs.replace(refuted().findings[0], diagnosis=diagnosis)
    assert len(advice(finding)) > 20 and set(_BY_CLASS) == set(CLASSES)


def test_a_repair_or_a_way_out_needs_none():
    finding = msgspec.structs.replace(refuted().findings[0], diagnosis="other")
    assert advice(msgspec.structs.replace(finding, repair=Repair("insert it", True, 1, 1))) == ""
    assert advice(msgspec.structs.replace(finding, diagnostic=Diagnostic("REL007", "read before its wait", fix="wait"))) == ""


def test_the_first_screen_says_what_is_wrong_where_and_what_to_do():
    report = refuted()
    report.findings = [msgspec.structs.replace(report.findings[0], diagnosis="partial sum")]
    screen = "\n".join(render(report).splitlines()[:25])
    for words in ("REFUTED: ", "error[", "--> ", "= algebra:", "= try:", "= explains:"):
        assert words in screen
