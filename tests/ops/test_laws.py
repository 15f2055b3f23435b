"""Fused and composed spellings agree, forward and backward, when whole programs are evaluated by rows; wrong variants do not."""
from __future__ import annotations

import pytest
import torch

from laws import RIGHT, WRONG, Law
from shadow import point, shadowed
from trainverify.algebra.real import Real


def real(shapes) -> Real:
    """Symbols have the recorded values, so that masks that were recorded are right."""
    table = torch.cat([torch.zeros(1, dtype=torch.float64), *(point(i, s).reshape(-1) for i, s in enumerate(shapes))])
    return Real(table)


@pytest.mark.parametrize("law", RIGHT + WRONG, ids=lambda law: law.name)
def test_rows_compose_to_what_torch_computes(law: Law):
    for fn in (law.left, law.right):
        got, native = shadowed(real(law.shapes), fn, law.shapes, law.grad)
        assert len(got) == len(native)
        for g, n in zip(got, native):
            torch.testing.assert_close(g.t, n)


def differences(law: Law) -> list[float]:
    left, right = (shadowed(real(law.shapes), fn, law.shapes, law.grad)[0] for fn in (law.left, law.right))
    assert len(left) == len(right)
    return [float((a.t - b.t).abs().max()) for a, b in zip(left, right)]


@pytest.mark.parametrize("law", RIGHT, ids=lambda law: law.name)
def test_right_pairs_agree_in_floats(law: Law):
    assert max(differences(law)) < 1e-9


@pytest.mark.parametrize("law", WRONG, ids=lambda law: law.name)
def test_wrong_pairs_differ_in_floats(law: Law):
    assert max(differences(law)) > 1e-5
