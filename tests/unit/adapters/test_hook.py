"""An adapter runs around its framework's imports, and what it replaces is in the traces and the report."""
import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest

from trainverify import adapters
from trainverify.adapters.hook import Hook, installed
from trainverify.engine.options import Options
from trainverify.ir.trace import Patched
from trainverify.report import json_, text
from trainverify.verify import verify_spec

FILES = {
    "__init__.py": "from toyframe.device import where\nSEEN = where()\nclass Norm:\n    def scale(self):\n        return 1\n",
    "device.py": "import toyplatform\ndef where():\n    return toyplatform.current()\nSTREAM = 'gpu'\n",
}
PLATFORM = "def current():\n    raise RuntimeError('no GPU')\n"
SPEC = """
import torch, trainverify as tv
import toyframe

def _training(model, batch):
    def step():
        loss = toyframe.Norm().scale() * model(batch).square().mean()
        loss.backward()
        return {"loss": loss}
    return tv.Training(model, step, batch=batch)

def reference():
    torch.manual_seed(0)
    return _training(torch.nn.Linear(3, 2), torch.randn(4, 3))

def parallel(ref):
    model = torch.nn.Linear(3, 2)
    model.load_state_dict(ref.weights)
    return _training(model, ref.batch)

RANKS = 1
"""


@pytest.fixture
def framework(tmp_path, monkeypatch):
    """A package that asks its platform for a GPU when it is imported."""
    (tmp_path / "toyframe").mkdir()
    for name, source in FILES.items():
        (tmp_path / "toyframe" / name).write_text(source)
    (tmp_path / "toyplatform.py").write_text(PLATFORM)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("toyframe", "toyplatform")]:
        del sys.modules[name]


def adapter(events=None):
    events = [] if events is None else events

    def before_import(patch):
        import toyplatform
        events.append("before")
        patch(toyplatform, "current", lambda: "cpu", "the framework asks for a GPU")

    def after_import(name, module, patch):
        events.append(name)
        if name == "toyframe.device":
            patch(module, "STREAM", None, "there are no streams")
        if name == "toyframe":
            patch(module.Norm, "mark", True, "its kernel does so")

    return SimpleNamespace(__name__="toy", FRAMEWORK="toyframe", before_import=before_import, after_import=after_import)


def test_patches_come_around_the_import_and_are_kept(framework):
    events = []
    with installed(Hook(lambda: [adapter(events)])) as hook:
        module = importlib.import_module("toyframe")
        assert module.SEEN == "cpu" and sys.modules["toyframe.device"].STREAM is None and module.Norm.mark
        assert events == ["before", "toyframe.device", "toyframe"]
        assert hook.applied == [Patched("toyframe", "toyplatform.current", "the framework asks for a GPU"),
                                Patched("toyframe", "toyframe.device.STREAM", "there are no streams"),
                                Patched("toyframe", "toyframe.Norm.mark", "its kernel does so")]
        assert inspect.getsource(module.Norm).startswith("class Norm")
    assert sys.modules["toyframe.device"].STREAM == "gpu" and not hasattr(module.Norm, "mark")
    with pytest.raises(RuntimeError, match="no GPU"):
        sys.modules["toyplatform"].current()


def test_a_name_that_only_begins_alike_is_another_package(framework):
    (framework / "toyframework.py").write_text("X = 1\n")
    events = []
    with installed(Hook(lambda: [adapter(events)])) as hook:
        assert importlib.import_module("toyframework").X == 1
        assert hook.applied == [] and events == []


def test_what_was_imported_before_is_patched_late(framework):
    (framework / "toyplatform.py").write_text("def current():\n    return 'gpu'\n")
    module = importlib.import_module("toyframe")
    with installed(Hook(lambda: [adapter()])) as hook:
        assert module.SEEN == "gpu" and sys.modules["toyframe.device"].STREAM is None
        assert len(hook.applied) == 3


def test_installing_twice_is_once(framework):
    hook = Hook(lambda: [adapter()])
    with installed(hook):
        hook.install()
        assert sys.meta_path.count(hook) == 1
    assert hook not in sys.meta_path


def test_a_patch_has_a_reason(framework):
    def before_import(patch):
        patch(sys.modules[__name__], "FILES", {}, "")
    with installed(Hook(lambda: [SimpleNamespace(__name__="toy", FRAMEWORK="toyframe", before_import=before_import)])):
        with pytest.raises(ValueError, match="without a reason"):
            importlib.import_module("toyframe")


def test_the_report_lists_what_was_replaced(framework, monkeypatch):
    monkeypatch.setattr(adapters, "HOOK", hook := Hook(lambda: [adapter()]))
    monkeypatch.chdir(framework)
    (framework / "spec.py").write_text(SPEC)
    try:
        report = verify_spec(framework / "spec.py", Options(steps=1))
    finally:
        hook.remove()
    assert report.verdict == "PROVED"
    assumed = {a.text: a.places for a in report.assumptions}
    assert assumed["toyframe: the framework asks for a GPU"] == ("toyplatform.current",)
    assert assumed["toyframe: there are no streams"] == ("toyframe.device.STREAM",)
    assert "toyframe: the framework asks for a GPU (toyplatform.current)" in " ".join(text.render(report).split())
    assert b"toyframe.device.STREAM" in json_.encode(report)


def test_every_adapter_of_the_package_says_what_it_is_for():
    for module in adapters.adapters():
        assert isinstance(module.FRAMEWORK, str) and module.__doc__
        assert hasattr(module, "before_import") or hasattr(module, "after_import")
