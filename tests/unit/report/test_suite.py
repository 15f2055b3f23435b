"""Several runs told together: the worst verdict wins, in the documented order."""
from itertools import combinations

import pytest
from trainverify.report.model import Suite

from . import reports

ORDER = ("refuted", "cannot_run", "internal", "equal_in_field", "proved")   # worst first
CODES = {"refuted": 1, "cannot_run": 1, "internal": 4, "equal_in_field": 3, "proved": 0}


@pytest.mark.parametrize(("worse", "better"), list(combinations(ORDER, 2)))
def test_the_worst_wins_wherever_it_stands(worse, better):
    for names in ((worse, better), (better, worse)):
        suite = Suite([reports.ALL[n]() for n in names])
        assert suite.exit_code == CODES[worse] and suite.worst == reports.ALL[worse]() and suite.verdict == suite.worst.verdict


def test_an_empty_suite_is_no_pass():
    assert Suite().exit_code == 3 and Suite().verdict == "UNKNOWN"
