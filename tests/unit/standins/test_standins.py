"""Stand-ins take their packages' place in imports, in the spec and in the ranks, and every call site is an assumption."""
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch
from trainverify import arguments
from trainverify.adapters import standins
from trainverify.adapters.standins import grouped_gemm
from trainverify.diagnostics import Fault
from trainverify.engine.options import Options
from trainverify.verify import verify, verify_spec

SPEC = """
import torch, trainverify as tv
{top}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(4, 12)

    def forward(self, x):
        {inside}
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).unbind(2)
        return flash_attn_func(q, k, v, causal=True).square().mean()

class Plain(Model):
    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, 2, 2)).unbind(2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()

def _training(model, batch):
    def step():
        loss = model(batch)
        loss.backward()
        return {{"loss": loss}}
    return tv.Training(model, step, batch=batch)

def reference():
    torch.manual_seed(0)
    return _training(Plain(), torch.randn(2, 3, 4))

def parallel(ref):
    model = Model()
    model.load_state_dict(ref.weights)
    return _training(model, ref.batch)

RANKS = 1
"""
IMPORT = "from flash_attn import flash_attn_func"


@pytest.fixture(autouse=True)
def withdrawn():
    yield
    standins.FINDER.withdraw()


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**parts):
        (tmp_path / "spec.py").write_text(SPEC.format(**{"top": "", "inside": "pass", **parts}))
        return tmp_path / "spec.py"
    return write


@pytest.mark.parametrize("where", ["top", "inside"])
def test_a_package_that_is_missing_is_stood_in_for(spec, where):
    file = spec(**{where: IMPORT})
    report = verify_spec(file, Options(steps=1))
    assert report.verdict == "PROVED", report.diagnostics
    line = 1 + next(i for i, text in enumerate(file.read_text().split("\n")) if "flash_attn_func(q" in text)
    (assumed,) = [a for a in report.assumptions if "flash_attn" in a.text]
    assert assumed.text.startswith("stand-in: flash_attn.flash_attn_func computes softmax(")
    assert assumed.places == (f"{file}:{line}",)


def test_a_program_that_does_without_it_is_left_alone(spec):
    guarded = "try:\n    from flash_attn import flash_attn_func\nexcept ImportError:\n    flash_attn_func = None"
    report = verify_spec(spec(top=guarded), Options(steps=1))
    assert report.verdict == "ERROR" and "NoneType" in report.diagnostics[0].message
    assert not standins.FINDER.provides("flash_attn")
    report = verify_spec(spec(top=guarded), Options(steps=1, stand_ins=("flash_attn",)))
    assert report.verdict == "PROVED"


def test_the_command_line_knows_their_names(capsys):
    args = arguments.parser().parse_args(["verify", "--stand-in", "flash_attn,apex"])
    assert args.stand_in == ("flash_attn", "apex")
    with pytest.raises(SystemExit):
        arguments.parser().parse_args(["verify", "--stand-in", "flashattn"])
    assert "flash_attn, grouped_gemm" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(Fault, match="STAND001"):
        standins.provide(["flashattn"])
    with pytest.raises(TypeError):
        verify(lambda: None, stand_ins=("apex",))


def test_naming_them_imports_no_torch():
    code = "import sys, trainverify.adapters.standins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("name", standins.STANDINS)
def test_a_package_as_programs_look_for_it(name):
    package = standins.STANDINS[name]
    standins.provide([name])
    for top in package.tops:
        assert importlib.util.find_spec(top) is not None
        assert importlib.import_module(top).__version__ == package.version
    assert importlib.metadata.version(package.distribution) == importlib.metadata.version(package.distribution.replace("-", "_")) == package.version
    assert set(package.tops) <= set(importlib.metadata.packages_distributions())
    for module in standins._modules(name):
        importlib.import_module(module)
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        importlib.import_module(f"{package.tops[0]}.no_such_part")
    standins.FINDER.withdraw()
    assert importlib.util.find_spec(package.tops[0]) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemm(transposed):
    a, b = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = b.transpose(1, 2) if transposed else b
    got = grouped_gemm.gmm(a, weights, torch.tensor([2, 0, 4]), trans_b=transposed)
    group = [0, 0, 2, 2, 2, 2]
    expected = torch.einsum("tk,tkn->tn", a, b[group])
    torch.testing.assert_close(got, expected)
    for x, y in zip(torch.autograd.grad(got.square().sum(), (a, b)), torch.autograd.grad(expected.square().sum(), (a, b))):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="sum to 5"):
        grouped_gemm.gmm(a, b, torch.tensor([2, 3, 0]))
