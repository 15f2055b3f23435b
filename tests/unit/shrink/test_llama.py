"""A reduced trace computes what the same model computes when it is built at the reduced sizes, with its counts as literals."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shrink import llama
from shrink.kit import captured, verified
from trainverify.ir.trace import TensorRef
from trainverify.ops.standard import standard_table
from trainverify.replay.machine import Hooks
from trainverify.replay.run import replay
from trainverify.shrink.check import execute
from trainverify.shrink.reduce import reduce_programs


def tensor(program, name: str, ref: TensorRef, dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(program.blobs[0][name], copy=True)).view(dtype).reshape(ref.size)


def test_reduced_trace_is_the_model_at_the_reduced_sizes():
    reference, parallel = captured(llama.reference, llama.parallel, 1)
    small = reduce_programs(reference, parallel, standard_table())
    ops = small.reference.traces[0].ops
    symbols = {c.args[1]: tensor(small.reference, f"symbol.{c.args[1]}", c.args[2], torch.float32) for c in ops if c.name == "tv.symbol"}
    machine = execute(small.reference, standard_table()).machines[0]
    found = {(o.kind, o.name): torch.as_tensor(o.native) for o in machine.outputs}
    batch = batch_of(small.reference)
    sizes = llama.Sizes(*batch["tokens"].shape, *symbols["embed"].shape, *attention_sizes(ops), symbols["blocks.0.gate"].shape[0])
    assert all(getattr(sizes, f) < getattr(llama.FULL, f) for f in ("samples", "hidden", "heads", "head_dim", "inner", "vocabulary")), sizes

    model = llama.Llama(sizes, llama.FULL)
    model.load_state_dict(symbols)
    model.positions = kept_positions(small)
    logits = model(batch["tokens"])
    valid = llama.FULL.samples * (llama.FULL.sequence - 1)
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / valid
    loss.backward()
    torch.testing.assert_close(found[("scalar", "loss")].float().reshape(()), loss.detach(), rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[("gradient", name)], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def kept_positions(small) -> torch.Tensor:
    """The recorded places in a sample that are kept."""
    tokens = next(c.args[1] for c in small.classes.programs["reference"].traces[0].ops if c.name == "tv.data" and "tokens" in c.args[0])
    return torch.from_numpy(small.kept.indices(small.classes.layouts[("reference", 0)].dims(tokens)[1]))


def attention_sizes(ops) -> tuple[int, int, int]:
    """Heads, key heads and head size of the reduced program."""
    q = next(c.args[0] for c in ops if c.name.startswith("aten._scaled_dot_product"))
    wk = next(c.args[2] for c in ops if c.name == "tv.symbol" and c.args[1] == "blocks.0.wk")
    return q.size[1], wk.size[0] // q.size[3], q.size[3]


def batch_of(program) -> dict[str, torch.Tensor]:
    """The tokens and labels that the reduced program reads."""
    read = {}

    def before(machine, call):
        if call.name == "tv.data":
            read[call.args[0].split("'")[1]] = machine.native.tensor(call.args[1]).clone()
    replay(program, [], standard_table(), Hooks(before=(before,)))
    return read


@pytest.mark.slow
def test_llama_is_proved_by_reduction():
    report = verified(llama.reference, llama.parallel, 1)
    assert report.verdict == "PROVED", report.diagnostics
    assert {c.name for c in report.reduction.classes if c.reduced < c.size} >= {"hidden", "samples"}
