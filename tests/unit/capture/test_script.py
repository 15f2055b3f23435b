"""Scripts in place of a spec: command lines, what a watched script records, where its weights come from, and what is wrong with one."""
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from capture.check import replayed
from trainverify.capture.options import CaptureOptions
from trainverify.capture.read_floats import ROWS, other_data
from trainverify.capture import scripted
from trainverify.capture.script import Command, Scripts, load_scripts, parse_command, parse_scripts
from trainverify.capture.scripted import live_models
from trainverify.capture.session import capture
from trainverify.diagnostics import Fault
from trainverify.ir.trace import Program, Trace

# A script as they are: a loop, data by seed, a loss that is printed. What tests vary stands in its arguments.
TRAIN = textwrap.dedent('''
    import argparse, os, sys
    import torch
    import torch.distributed as dist
    from torch import nn

    parser = argparse.ArgumentParser()
    for name in ("load", "dcp", "save", "resume"):
        parser.add_argument("--" + name)
    for name, default in (("rows", 6), ("steps", 4), ("code", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    for name in ("fsdp", "other", "extra", "local", "noise", "fail", "early", "swallow"):
        parser.add_argument("--" + name, action="store_true")
    args = parser.parse_args()
    assert __name__ == "__main__" and not dist.is_initialized()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    print("arguments", sys.argv[1:], "folder", os.path.isdir(sys.path[0]))
    if args.code:
        sys.exit(args.code)
    torch.manual_seed(1 if args.other else 0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    average = [p.detach().clone() for p in model.parameters()] if args.early else None
    if args.fsdp:
        from torch.distributed.fsdp import fully_shard
        fully_shard(model)
    elif world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain = getattr(model, "module", model)
    if args.load:
        from safetensors.torch import load_file
        plain.load_state_dict(load_file(args.load + "/model.safetensors"))
    if args.dcp:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=args.dcp)
        set_model_state_dict(model, state["model"])
    if args.resume:
        state = torch.load(args.resume + "/last.pt")
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if args.fail:
        raise RuntimeError("no data")
    data = torch.randn(args.steps, args.rows * world, 5, generator=torch.Generator().manual_seed(3))
    for step in range(args.steps):
        x = data[step]
        if args.noise:
            x = torch.randn(args.rows * world, 5, generator=torch.Generator().manual_seed(step))
        x = x[rank::world]
        try:
            loss = model(x).square().mean()
        except Exception:
            sys.exit("never")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= world
        if args.local:
            print("mine", loss.item())
        if rank == 0:
            print(f"step {step}", mean.item(), float(mean))
            if args.extra:
                print(mean.sqrt().item())
    if args.save:
        torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, args.save + "/last.pt")
    dist.destroy_process_group()
''')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(reference, parallel, ranks=2, steps=2, **more):
    scripts = load_scripts(parse_scripts(reference, parallel, ranks, **more))
    return capture(scripts, CaptureOptions(steps=steps, timeout=60, second_run=False))


def outputs(trace, kind):
    return [(c.args[1], c.args[2]) for c in trace.ops if c.name == "tv.output" and c.args[0] == kind]


def noted(trace, code):
    return [n.text for n in trace.notes if n.code == code]


def codes(captured):
    return [d.code for d in captured.diagnostics]


# ---- command lines

def test_command_lines(folder):
    assert parse_command("python train.py --rows 2") == Command("train.py", ("--rows", "2"))
    assert parse_command(["-m", "json.tool", "a b"]) == Command("json.tool", ("a b",), module=True)
    scripts = parse_scripts("train.py", "ranks=3 train.py --load {checkpoint}/x", 2, ["loss.item=sum"], ["norm"])
    assert (scripts.ranks, scripts.local, scripts.skip, scripts.loads) == (3, {"loss.item": "sum"}, ("norm",), True)
    assert str(scripts) == "train.py --load '{checkpoint}/x'"
    assert scripts.parallel.filled({"checkpoint": Path("/c")}).arguments == ("--load", "/c/x")
    assert not parse_scripts("train.py", "train.py", 2).loads


@pytest.mark.parametrize(("line", "code"), [("", "SCRIPT001"), ("'", "SCRIPT001"), ("torchrun train.py", "SCRIPT001"), ("gone.py", "SCRIPT001"), ("-m gone.module", "SCRIPT001"),
                                           ("train.py --load {weights}", "SCRIPT002")])
def test_wrong_command_lines(folder, line, code):
    with pytest.raises(Fault) as e:
        parse_command(line)
    assert [d.code for d in e.value.diagnostics] == [code] and e.value.diagnostics[0].fix


def test_what_is_in_braces_and_no_placeholder(folder):
    assert parse_command(["train.py", '{"a": 1}']).arguments == ('{"a": 1}',)


def test_an_undeclared_share(folder):
    with pytest.raises(Fault, match="SCRIPT002"):
        parse_scripts("train.py", "train.py", 2, ["loss"])


def test_the_reference_goes_without_a_checkpoint(folder):
    command = parse_command("train.py --rows 2 --load {checkpoint} --dcp={dcp} --save {save}")
    assert command.without("checkpoint", "dcp") == (Command("train.py", ("--rows", "2", "--save", "{save}")), ("--load {checkpoint}", "--dcp={dcp}"))
    with pytest.raises(Fault, match="SCRIPT002"):
        parse_command("train.py {checkpoint}").without("checkpoint")


# ---- what is recorded

def test_a_script(folder):
    captured = run("train.py --load {checkpoint}", "train.py --rows 3 --load {checkpoint}", 2)
    assert captured.diagnostics == []
    reference, parallel = captured.reference.traces[0], captured.parallel.traces
    names = [f"{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    assert [n for kind, n in ((c.args[0], c.args[1]) for c in reference.ops if c.name == "tv.symbol") if kind == "weight"] == names
    for trace in (reference, *parallel):
        assert [c.args[0] for c in trace.ops if c.name == "tv.step"] == [1, 2]
        assert outputs(trace, "gradient") == [(n, s) for s in (1, 2) for n in names] == outputs(trace, "parameter")
        assert {n for n, _ in outputs(trace, "state")} == {f"{n}::momentum_buffer" for n in names}
    assert outputs(reference, "scalar") == outputs(parallel[0], "scalar") == [("mean", 1), ("mean#2", 1), ("mean", 2), ("mean#2", 2)]
    assert outputs(parallel[1], "scalar") == []
    assert noted(reference, "ASSUME") == ["the reference script ran without --load {checkpoint}: the weights in that file are its own initial ones"]
    assert not noted(parallel[0], "ASSUME")
    replayed(captured.reference)
    replayed(captured.parallel)


def test_floats_that_one_side_reads(folder):
    captured = run("train.py --extra", "train.py --rows 3 --local --load {checkpoint}", 2, skip=["nothing"])
    assert [(d.code, d.severity, d.message) for d in captured.diagnostics] == [
        ("SCRIPT006", "note", "not compared: loss (steps 1, 2): only the parallel script reads it"),
        ("SCRIPT006", "note", "not compared: mean.sqrt() (steps 1, 2): only the reference script reads it")]
    assert {n for n, _ in outputs(captured.reference.traces[0], "scalar")} == {"mean", "mean#2"}
    assert all(c.kwargs == {"read": "some"} for c in captured.parallel.traces[0].ops if c.name == "tv.output" and c.args[0] == "scalar")


def test_other_data():
    def program(side, *ranks):
        return Program([Trace(side, r, len(ranks)) for r in range(len(ranks))], [{ROWS: np.array(rows, dtype=np.int64).reshape(-1, 2)} for rows in ranks])

    reference = program("reference", [(8, 1), (8, 2), (8, 3)])
    assert other_data(reference, program("parallel", [(8, 1)], [(8, 2), (8, 3), (4, 7)], [])) == ()
    (warning,) = other_data(reference, program("parallel", [(8, 1)], [(8, 5), (8, 6), (8, 1)]))
    assert (warning.code, warning.severity, warning.ranks) == ("SCRIPT008", "warning", (1,)) and "up to 2 rows" in warning.message


def test_other_data_of_a_script(folder):
    (folder / "tokens.py").write_text(textwrap.dedent('''
        import os, sys, torch
        from torch import nn
        rank, world, rows = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(sys.argv[1])
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            tokens = torch.randint(9, (rows * world, 4), generator=torch.Generator().manual_seed(step))
            model(tokens[rank::world]).sum().backward()
            optimizer.step()
    '''))
    assert codes(run("tokens.py 4", "tokens.py 2", 2)) == []
    assert codes(run("tokens.py 4", "tokens.py 4", 2)) == ["SCRIPT008"]


@pytest.mark.slow
def test_floats_that_are_shares_or_skipped(folder):
    captured = run("train.py --local", "train.py --rows 3 --local --load {checkpoint}", 2, local=["loss=mean"], skip=["mean"])
    assert codes(captured) == ["SCRIPT006"] and captured.diagnostics[0].message == "not compared: mean (steps 1, 2): --skip"
    declared = [c.kwargs for t in captured.parallel.traces for c in t.ops if c.name == "tv.output" and c.args[0] == "scalar"]
    assert declared == [{"declare": "mean", "read": "all"}] * 4


def test_weights_are_placed(folder):
    captured = run("train.py", "train.py --fsdp --rows 3", 2)
    assert captured.diagnostics == []
    (text,) = noted(captured.parallel.traces[0], "ASSUME")
    assert text.startswith("weights were placed by the verifier")
    held = {c.args[1]: c.args[2] for c in captured.reference.traces[0].ops if c.name == "tv.symbol"}
    (rows, columns) = held["0.weight"].size
    for trace in captured.parallel.traces:
        assert next(c.args[1].size for c in trace.ops if c.name == "tv.param" and c.args[0] == "0.weight") == (rows // 2, columns)
    replayed(captured.parallel)


def test_weights_that_cannot_be_placed(folder):
    (folder / "wide.py").write_text(TRAIN.replace("nn.Linear(5, 4)", "nn.Linear(5, 8)").replace("nn.Linear(4, 3)", "nn.Linear(8, 3)"))
    captured = run("train.py", "wide.py", 2)
    assert set(codes(captured)) == {"SCRIPT007"} and captured.parallel is None
    assert captured.diagnostics[0].message == "0.weight has shape [8, 5] here and [4, 5] in the reference script's model"


@pytest.mark.slow
def test_a_distributed_checkpoint(folder):
    captured = run("train.py", "train.py --fsdp --rows 3 --other --dcp {dcp}", 2)
    assert captured.diagnostics == [] and not noted(captured.parallel.traces[0], "ASSUME")
    replayed(captured.parallel)


@pytest.mark.slow
def test_the_script_saves_itself(folder):
    captured = run("train.py --save {save}", "train.py --other --rows 3 --resume {save}", 2)
    assert captured.diagnostics == []
    tags = captured.reference.blobs[0]["symbol.0.weight"]
    first = next(c.args[1] for c in captured.parallel.traces[0].ops if c.name == "tv.param" and c.args[0] == "0.weight")
    assert first.size == (4, 5) and tags.nbytes == 80
    replayed(captured.parallel)


@pytest.mark.slow
def test_nothing_is_saved(folder):
    captured = run("train.py", "train.py --resume {save}", 2)
    assert codes(captured) == ["SCRIPT005"] and captured.parallel is None


@pytest.mark.slow
def test_weights_that_are_read_early(folder):
    captured = run("train.py --early", "train.py --rows 3 --load {checkpoint}", 2)
    assert captured.diagnostics == []
    ops = captured.reference.traces[0].ops
    assert next(c.index for c in ops if c.name == "tv.symbol") < next(c.index for c in ops if c.name == "aten.clone.default")


@pytest.mark.slow
def test_drawn_data_is_no_part_of_the_model(folder):
    captured = run("train.py --noise", "train.py --noise --rows 3 --load {checkpoint}", 2)
    assert captured.diagnostics == []
    for trace in (captured.reference.traces[0], *captured.parallel.traces):
        assert not [c for c in trace.ops if c.name.startswith("aten.randn") and c.index > next(c.index for c in trace.ops if c.name == "tv.step")]
        assert any("data as recorded" in t for t in noted(trace, "ASSUME"))
    replayed(captured.reference)


@pytest.mark.slow
def test_a_module(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("")
    (folder / "pack" / "train.py").write_text(TRAIN)
    captured = run("-m pack.train", "-m pack.train --rows 3 --load {checkpoint}", 2, steps=1)
    assert captured.diagnostics == [] and len(captured.parallel.traces) == 2


# ---- what goes wrong

@pytest.mark.parametrize(("arguments", "code", "message"), [
    ("--steps 1", "SCRIPT004", "ends after 1 of 2 optimizer steps"), ("--steps 0", "SCRIPT003", "no optimizer of torch.optim has made a step"),
    ("--fail", "RUN009", "no data"), ("--code 3", "RUN009", "3"), ("--unknown", "RUN009", "2")])
def test_a_script_that_cannot_be_used(folder, arguments, code, message):
    captured = run(f"train.py {arguments}", "train.py", 2)
    assert codes(captured) == [code] and message in captured.diagnostics[0].message and captured.reference is None


def test_a_script_does_not_handle_what_goes_wrong_in_ours(folder, monkeypatch):
    def broken(self, chunks=None):
        raise ZeroDivisionError("ours")
    monkeypatch.setattr(scripted._Run, "_begin", broken)
    (found,) = run("train.py", "train.py --fsdp").diagnostics
    assert "ZeroDivisionError: ours" in found.message and "never" not in found.message


def test_a_pipeline_stops_at_its_messages(folder):
    (folder / "pipeline.py").write_text(textwrap.dedent('''
        import os, torch, torch.distributed as dist
        from torch import nn
        dist.init_process_group()
        rank, world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)
        layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
        mine = nn.Sequential(*layers) if world == 1 else nn.ModuleDict({str(rank): layers[rank]})
        del layers
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
        data = torch.randn(3, 4, 3)
        for x in data:
            optimizer.zero_grad()
            if world == 1:
                mine(x).square().sum().backward()
            elif rank == 0:
                y = mine["0"](x)
                dist.send(y.detach(), 1)
                gradient = torch.empty_like(y)
                dist.recv(gradient, 1)
                y.backward(gradient)
            else:
                y = torch.empty(4, 3)
                dist.recv(y, 0)
                y.requires_grad_()
                mine["1"](y).square().sum().backward()
                dist.send(y.grad, 0)
            optimizer.step()
    '''))
    captured = run("pipeline.py", "pipeline.py", 2)
    assert captured.diagnostics == []
    assert [outputs(t, "gradient") for t in captured.parallel.traces] == [[(f"{r}.{p}", s) for s in (1, 2) for p in ("weight", "bias")] for r in (0, 1)]


# ---- parts

def test_live_models():
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 2)
    wrapped, other = nn.Sequential(inner), nn.Linear(3, 3)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD([*outer.parameters(), *inner.parameters()], lr=1.0)
    assert live_models([optimizer]) == [outer, wrapped]
    copies = torch.optim.SGD([p.detach().clone() for p in other.parameters()], lr=1.0)
    assert {id(m) for m in (outer, wrapped, other)} <= {id(m) for m in live_models([copies])} and frozen not in live_models([copies])


def test_a_scripts_seed_is_the_number_of_the_routing(folder):
    scripts = parse_scripts("train.py --seed {routing}", "train.py --name seed-{routing} --load {checkpoint}/{routing}", 2)
    assert not parse_scripts("train.py", "train.py --seed {routing}", 2).loads and scripts.loads
    routed = scripts.routed(3)
    assert routed.reference.arguments == ("--seed", "3") and routed.parallel.arguments == ("--name", "seed-3", "--load", "{checkpoint}/3")
    assert routed.ranks == 2 and scripts.reference.arguments == ("--seed", "{routing}")


def test_scripts_are_like_a_spec(folder):
    scripts = Scripts(Command("train.py"), Command("train.py"))
    assert scripts.case({}) == {} and scripts.op_rows() == () and scripts.world_size(3, {}) == 3
    with pytest.raises(Fault, match="SPEC005"):
        scripts.world_size(None, {})
    assert os.path.basename(scripts.path) == ""
