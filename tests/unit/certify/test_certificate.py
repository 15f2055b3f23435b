"""Certificates: written, read, proved again, and rejected when they were changed."""
import json
import subprocess
import sys
from fractions import Fraction

import msgspec
import pytest
from kernel.expr import World
from kernel.obligations import adamw, ring_attention

from trainverify.certify import certificate
from trainverify.certify.certificate import Certificate, obligation_of, read_certificate, recheck, write_certificate
from trainverify.diagnostics import Fault
from trainverify.kernel import NONNEGATIVE, POSITIVE, Node, Obligation
from trainverify.kernel.terms import digest


def some():
    """Obligations of a few families, each kind of attribute among them."""
    found = []
    for family in (adamw, ring_attention):
        w = World()
        found += [w.claim(*pair) for pair in family(w, 2, False)]
    w = World()
    x, y = w.leaf("x"), w.leaf("y", NONNEGATIVE)
    found.append(w.claim(w.compare("gt", x, y) * w.uf("silu'", x) + y ** Fraction(3, 2), y * w.sqrt(y) + w.uf("silu'", x) * w.compare("lt", y, x)))
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "proof.json"
    write_certificate(path, some(), ["casts between float types are the identity"], {"trainverify": "0.1.0", "spec": "spec.py"})
    return path


def code(path, what=recheck):
    with pytest.raises(Fault) as fault:
        what(path)
    diagnostic, = fault.value.diagnostics
    assert str(path) in diagnostic.message and diagnostic.fix
    return diagnostic.code


def changed(path, change):
    """The file after a change to its data, with a seal and addresses that fit: what someone would do who knows the format."""
    data = json.loads(path.read_bytes())
    change(data)
    data["seal"] = ""
    data["seal"] = certificate._seal(msgspec.json.decode(json.dumps(data), type=Certificate))
    path.write_text(json.dumps(data))
    return path


def test_round_trip(file):
    read = read_certificate(file)
    assert {digest(ob): ob for ob in some()} == {e.digest: obligation_of(e) for e in read.obligations}
    assert read.assumptions == ("casts between float types are the identity",)
    assert read.made == {"trainverify": "0.1.0", "spec": "spec.py"}


def test_equal_obligations_are_written_once(tmp_path):
    assert write_certificate(tmp_path / "a", some()) == write_certificate(tmp_path / "b", [*some(), *reversed(some())])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_recheck(file):
    steps = []
    result = recheck(file, lambda done, all_: steps.append((done, all_)))
    count = len({digest(ob) for ob in some()})
    assert result.accepted and result.rejected == () and result.obligations == count
    assert steps == [(k, count) for k in range(1, count + 1)]
    assert result.assumptions and "holds for all real values" in result.establishes


def test_nothing_to_prove(tmp_path):
    write_certificate(tmp_path / "empty", [])
    result = recheck(tmp_path / "empty")
    assert result.accepted and result.obligations == 0


def test_recheck_never_imports_torch(file):
    program = ("import sys; from trainverify.certify.certificate import recheck; r = recheck(sys.argv[1]); "
               "sys.exit(bool(not r.accepted or {'torch', 'z3', 'cvc5'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", program, str(file)], timeout=120).returncode == 0


# ---- damage
@pytest.mark.parametrize("change", [lambda b: b[:-200], lambda b: b.replace(b'"leaf",0', b'"leaf",7', 1), lambda b: b[:50] + b"\xff" + b[50:], lambda b: b"",
                                    lambda b: b"[]", lambda b: b"{}", lambda b: b.replace(b"casts between", b"casts among"), lambda b: b"[" * 100_000,
                                    lambda b: b.replace(b'"lhs":', b'"extra":1,"lhs":', 1)])
def test_damage_is_seen(file, change):
    damaged = change(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    assert code(file) == "CERT001"


def test_no_file(tmp_path):
    assert code(tmp_path / "none.json") == "CERT001"
    assert code(tmp_path) == "CERT001"


def test_another_version(file):
    file.write_bytes(file.read_bytes().replace(b'"version":1', b'"version":2'))
    assert code(file) == "CERT002"


def test_a_place_that_cannot_be_written(tmp_path):
    assert code(tmp_path / "no" / "proof.json", lambda path: write_certificate(path, some())) == "FILE006"


# ---- tampering, with a seal that fits
def rejections(path):
    result = recheck(path)
    assert not result.accepted
    assert {d.code for d in result.rejected} == {"CERT003"}
    return [d.message for d in result.rejected]


def entry(data):
    """An obligation whose sides are not one node."""
    return next(e for e in data["obligations"] if e["lhs"] != e["rhs"])


TAMPERED = {
    "another claim": (lambda e: e.update(rhs=0), "its content has the address"),
    "another node": (lambda e: e["nodes"].append(["leaf", 99, []]), "its content has the address"),
    "another address": (lambda e: e.update(digest="0" * 32), "its content has the address"),
    "a cycle": (lambda e: e["nodes"].__setitem__(1, ["exp", None, [1]]), "does not stand before it"),
    "an unknown kind": (lambda e: e["nodes"].__setitem__(1, ["proved", None, []]), "is malformed"),
    "no fraction": (lambda e: e["nodes"].__setitem__(1, ["const", "1/0", []]), "is not a fraction"),
    "an exponent": (lambda e: e["nodes"].__setitem__(1, ["const", "1e999999999", []]), "is not a fraction"),
    "an attribute of another type": (lambda e: e["nodes"].__setitem__(1, ["const", 1, []]), "is not a fraction"),
    "a sign that is none": (lambda e: e.update(given=[[0, 8]]), "what is given is malformed"),
    "more given": (lambda e: e.update(given=[*e["given"], [0, POSITIVE]]), "its content has the address"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_with_an_obligation(file, name):
    change, message = TAMPERED[name]
    found = rejections(changed(file, lambda data: change(entry(data))))
    assert len(found) == 1 and message in found[0]


def test_an_obligation_that_does_not_hold(tmp_path):
    """Everything fits but the mathematics."""
    w = World()
    pairs = adamw(w, 2, True)
    write_certificate(tmp_path / "wrong", [w.claim(*pair) for pair in pairs])
    assert all("the kernel does not prove it (it is false)" in message for message in rejections(tmp_path / "wrong"))
    x = World().leaf("x")
    write_certificate(tmp_path / "undefined", [x.w.claim(x.w.lift(1), x / x)])
    assert "the kernel does not prove it (definedness)" in rejections(tmp_path / "undefined")[0]


@pytest.mark.parametrize("claim", [(0, -1), (5, 0), (0, 0, ((3, POSITIVE),))])
def test_roots_that_do_not_exist(tmp_path, claim):
    write_certificate(tmp_path / "f", [Obligation((Node("leaf", 0, ()),), *claim)])
    assert "roots are malformed" in rejections(tmp_path / "f")[0]


def test_a_small_budget_is_kept(tmp_path):
    w = World()
    pairs = ring_attention(w, 2, False)
    write_certificate(tmp_path / "f", [w.claim(*pairs[0])], budget=1)
    assert "the kernel does not prove it (budget)" in rejections(tmp_path / "f")[0]
