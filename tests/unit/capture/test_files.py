"""Programs on disk come back as they were; damage is a diagnostic."""
import msgspec
import numpy as np
import pytest

from trainverify.diagnostics import Fault, Span
from trainverify.ir.files import load_program, save_program
from trainverify.ir.trace import (Collective, Group, Name, Note, OpCall, Program, ScalarRef, Sequence, Storage, TensorRef, Trace)


def program():
    ref = TensorRef(0, 2, (2, 3), (3, 1), "float32")
    span = Span("a.py", 3, "f", "layers.0", "backward", 1, (("b.py", 4, "g"),))
    collective = Collective("all_reduce", (0, 1), "0", 1, (ref,), (ref,), "sum", work=3)
    ops = [OpCall(0, "aten.add.Tensor", (ref, 2, 0.1, True, None, "x", ScalarRef(4), Name("dtype", "float32"), Sequence((ref, Sequence(())))),
                  {"alpha": float("inf")}, ref, (ref,), 0, None, 5, 6, True),
           OpCall(1, "c10d.allreduce_.default", (ref,), {}, None, (ref,), 0, collective)]
    traces = [Trace("parallel", r, 2, ops, [Storage(24, True)], [span], [Note("X", 0, "t")], [Group("0", (0, 1), "dp")], 2, {"seed": "0"}) for r in range(2)]
    return Program(traces, [{"init.0": np.arange(24, dtype=np.uint8), "symbol.a b": np.zeros(0, np.float32)} for _ in range(2)])


def test_round_trip(tmp_path):
    before = program()
    save_program(before, tmp_path / "p")
    after = load_program(tmp_path / "p")
    assert after.traces == before.traces
    for a, b in zip(after.blobs, before.blobs):
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)


def code(folder):
    with pytest.raises(Fault) as caught:
        load_program(folder)
    return caught.value.diagnostics[0].code


def test_nothing_there(tmp_path):
    assert code(tmp_path) == "FILE001"


def test_other_version(tmp_path):
    save_program(program(), tmp_path)
    index = msgspec.json.decode((tmp_path / "program.json").read_bytes())
    (tmp_path / "program.json").write_bytes(msgspec.json.encode({**index, "version": 99, "new": 1}))
    assert code(tmp_path) == "FILE002"


@pytest.mark.parametrize("name", ["trace.1.msgpack", "blobs.0.safetensors", "program.json"])
@pytest.mark.parametrize("how", ["remove", "truncate", "flip", "empty"])
def test_damage(tmp_path, name, how):
    save_program(program(), tmp_path)
    file = tmp_path / name
    data = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x55
        file.write_bytes({"truncate": data[:-3], "flip": data, "empty": b""}[how])
    assert code(tmp_path) == ("FILE001" if (name, how) == ("program.json", "remove") else "FILE003")
