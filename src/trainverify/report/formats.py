"""The report formats by name; each is rendered from the one report model by its own module (no torch, not trusted)."""
from __future__ import annotations

from trainverify.report import github, json_, junit, sarif
from trainverify.report.model import Report, Suite

FORMATS = ("text", "json", "junit", "github", "sarif")


def render(form: str, result: Report | Suite, root: str) -> str:
    """A report or a suite in a machine's format; `root` is the folder that paths are relative to where a format wants that."""
    reports = result.reports if isinstance(result, Suite) else [result]
    if form == "junit":
        return junit.render(reports)
    if form == "github":
        return github.render(reports, root)
    if form == "sarif":
        return sarif.render(reports, root)
    return (json_.encode_suite(result) if isinstance(result, Suite) else json_.encode(result)).decode()
