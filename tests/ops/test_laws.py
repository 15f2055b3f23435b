"""Fused and composed spellings agree, forward and backward, when whole programs are evaluated by rows; wrong variants do not."""
from __future__ import annotations

import pytest
import torch

from laws import RIGHT, WRONG, Law
from shadow import Shadow, point, shadowed
from trainverify.algebra.field import Field
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


def equal_in_the_field(law: Law, seed: int) -> bool:
    m = Field(seed)
    left, _ = shadowed(m, law.left, law.shapes, law.grad)
    m.begin_side("parallel")
    right, _ = shadowed(m, law.right, law.shapes, law.grad)
    return all(bool(m.equal(a, b).all()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("law", RIGHT, ids=lambda law: law.name)
def test_right_pairs_are_equal_in_the_field(law: Law):
    assert equal_in_the_field(law, 0)
    assert equal_in_the_field(law._replace(left=law.right, right=law.left), 1)


@pytest.mark.parametrize("law", WRONG, ids=lambda law: law.name)
def test_wrong_pairs_differ_in_the_field(law: Law):
    assert not equal_in_the_field(law, 0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.block = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.norm = torch.nn.RMSNorm(8)

    def forward(self, ids):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64)
        x = self.norm(self.block(self.embed(ids), src_mask=mask, is_causal=True))
        return torch.nn.functional.cross_entropy((x @ self.embed.weight.t()).flatten(0, 1), ids.roll(1, 1).flatten())


def test_a_whole_training_step():
    """Loss, gradients and updated parameters of a tied transformer, evaluated by rows from the parameters' values alone."""
    torch.manual_seed(0)
    model = Model().double()
    params = list(model.parameters())
    m = Real(torch.cat([p.detach().reshape(-1) for p in params]))
    mode, first = Shadow(m), 0
    for p in params:
        mode.write(p.detach(), m.reshape(m.symbols("p", first, p.numel()), tuple(p.shape)))
        first += p.numel()
    optimizer = torch.optim.AdamW(params, lr=0.1)
    with mode:
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.tensor([[1, 4, 2, 7], [0, 10, 3, 3]]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
    for t in (loss, *params, *(p.grad for p in params)):
        torch.testing.assert_close(mode.read(t.detach()).t, t.detach())
