"""Imports point one way, torch stays where it belongs, and only capture changes PyTorch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "src" / "trainverify"

# Lower layers first; a layer may import from those before it. algebra/base.py is the interface that rows are written in, so it stands below ops.
LAYERS = ("diagnostics", "report.model", "ir", "algebra.base", "ops", "algebra", "replay", "relate", "contracts", "engine", "diagnose", "report", "verify", "cli")
ALONGSIDE = {
    "capture": {"diagnostics", "ir", "ops", "api", "processes", "adapters"},
    "adapters": {"diagnostics", "ir"},
    "api": {"diagnostics"},
    "kernel": {"diagnostics"},
    "certify": {"kernel", "diagnostics"},
    "shrink": {"diagnostics", "report.model", "ir", "ops", "algebra.base", "replay", "relate", "kernel", "engine"},
    "progress": set(), "processes": set(), "explain": set(), "optable": {"ops"},
    "cli": {*LAYERS, "arguments", "progress", "processes", "explain", "optable", "config", "cases", "certify"},
    "arguments": {"report", "adapters"},
    "config": {"diagnostics"}, "cases": {"processes", "verify", "capture", "progress", "engine", "report", "report.model", "diagnostics"},
    "verify": {"capture", "api", "certify", "cache", "shrink"}, "algebra": {"kernel"}, "relate": {"kernel"}, "contracts": {"kernel"}, "engine": {"kernel", "processes"}, "report": {"explain"},
    "__main__": {"cli"}, "__init__": {"api", "verify", "testing"},
    "cache": {"diagnostics", "ir", "engine", "report", "report.model"},
    "testing": {"verify", "cases", "engine", "report", "report.model"}, "pytest_plugin": {"testing", "cases", "diagnostics", "report"},
}
NO_TORCH = ("diagnostics", "ir", "report", "report.model", "kernel", "certify", "cli", "arguments", "progress", "processes", "explain", "optable", "config", "cases", "testing", "pytest_plugin", "__init__", "__main__")
FILES = sorted(ROOT.rglob("*.py"))


def part(module: str) -> str:
    """The layer that a module (dotted, below trainverify) belongs to."""
    return module if module in LAYERS else module.split(".")[0]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") if file.parent != ROOT else file.stem


def imports(file: Path):
    """(module, line, inside a function, for types only) of every import."""
    def walk(node, deferred, typing):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((a.name, child.lineno, deferred, typing) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: imports are absolute"
                module = child.module
                for a in child.names:   # `from trainverify.report import text` imports a module too
                    sub = ROOT.parent / Path(*module.split("."), f"{a.name}.py")
                    package = ROOT.parent / Path(*module.split("."), a.name, "__init__.py")
                    yield (f"{module}.{a.name}" if sub.exists() or package.exists() else module), child.lineno, deferred, typing
            else:
                types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, deferred or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)), typing or types)
    yield from walk(ast.parse(file.read_text()), False, False)


def allowed(layer: str) -> set[str]:
    below = set(LAYERS[:LAYERS.index(layer) + 1]) if layer in LAYERS else {layer}
    return below | ALONGSIDE.get(layer, set())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file):
    layer = part(name_of(file))
    bad = [f"{file}:{line} imports {module}" for module, line, _, typing in imports(file)
           if module.startswith("trainverify.") and not typing and part(module.removeprefix("trainverify.")) not in allowed(layer)]
    assert bad == []


def test_every_module_has_a_layer():
    assert [name_of(f) for f in FILES if part(name_of(f)) not in {*LAYERS, *ALONGSIDE}] == []


@pytest.mark.parametrize("file", [f for f in FILES if name_of(f) in NO_TORCH or part(name_of(f)) in NO_TORCH], ids=name_of)
def test_no_torch(file):
    assert [f"{file}:{line}" for module, line, _, typing in imports(file) if module.split(".")[0] == "torch" and not typing] == []


@pytest.mark.parametrize("module", ["trainverify", "trainverify.cli", "trainverify.ir.trace", "trainverify.report.text", "trainverify.report.json_",
                                    "trainverify.report.schema", "trainverify.engine.options", "trainverify.explain", "trainverify.optable",
                                    "trainverify.config", "trainverify.cases", "trainverify.testing", "trainverify.pytest_plugin", "trainverify.report.formats",
                                    "trainverify.certify.certificate", "trainverify.certify.second", "trainverify.certify.dump"])
def test_importing_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_loading_the_pipeline_does_not_hide_its_function():
    code = "import importlib, trainverify as tv; importlib.import_module('trainverify.verify'); from trainverify.verify import verify_spec; assert callable(tv.verify)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_public_names():
    import trainverify
    assert trainverify.__all__ == sorted(["Training", "local", "fixed", "op", "routing", "verify", "assert_equivalent"])
    assert set(trainverify.__all__) < set(dir(trainverify))
    with pytest.raises(AttributeError, match="no attribute 'prove'"):
        trainverify.prove


def patches(file: Path):
    """Lines that assign to an attribute of torch or one of its modules, or set one by name."""
    tree = ast.parse(file.read_text())
    modules = {a.asname or a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.split(".")[0] == "torch"}
    modules |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "torch" for a in n.names}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "unittest.mock.patch.object", "patch.object") and node.args:
            targets = [ast.Attribute(node.args[0], "x")]
        for t in targets:
            root = t
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if isinstance(t, (ast.Attribute, ast.Subscript)) and isinstance(root, ast.Name) and root.id in modules:
                yield f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", [f for f in FILES if part(name_of(f)) != "capture"], ids=name_of)
def test_only_capture_patches_torch(file):
    assert list(patches(file)) == []


def test_patches_are_seen(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import torch\nimport torch.distributed as dist\nfrom torch import Tensor\ntorch.foo = 1\ndist.x.y = 2\nsetattr(Tensor, 'a', 3)\ny = torch.z\n")
    assert [p.rsplit(":")[-1] for p in patches(file)] == ["4", "5", "6"]
