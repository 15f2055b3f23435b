"""Every diagnostic code has its page, and every page says what a page must say."""
import re
from pathlib import Path

import pytest
from trainverify import explain

SRC = Path(explain.__file__).parent
CODE = re.compile(r"""["']([A-Z]{3,6}[0-9]{3})["']""")
SECTIONS = ["What it means", "Why it matters", "Example", "Way out"]


def codes_in_use():
    used = {}
    for file in sorted(SRC.rglob("*.py")):
        for code in CODE.findall(file.read_text()):
            used.setdefault(code, file.name)
    return used


@pytest.mark.parametrize(("code", "file"), codes_in_use().items())
def test_a_code_that_is_used_has_a_page(code, file):
    assert explain.page(code), f"{code} ({file}) has no src/trainverify/pages/{code}.md"


def test_the_search_for_codes_finds_some():
    assert {"REL001", "RUN001", "OPS001"} <= set(codes_in_use())


@pytest.mark.parametrize("code", explain.codes())
def test_page(code):
    text = explain.page(code)
    assert text.isascii() and text.endswith("\n")
    assert text.startswith(f"# {code}: ") and len(text.split("\n", 1)[0]) <= 90
    assert re.findall(r"(?m)^## (.*)$", text) == SECTIONS
    assert all(body.strip() for body in re.split(r"(?m)^## .*$", text)[1:])
    assert re.search(r"(?m)^    \S", text), "the example is a code block"


@pytest.mark.parametrize("code", explain.codes())
def test_codes_that_a_page_names_have_pages(code):
    named = set(re.findall(r"\b[A-Z]{3,6}[0-9]{3}\b", explain.page(code)))
    assert named <= set(explain.codes())
