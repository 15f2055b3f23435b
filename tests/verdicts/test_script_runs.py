"""What scripts are found to be: the floats that they print compared as what they are, and everything else as of a spec."""
import textwrap

import pytest
from trainverify.capture.script import parse_scripts
from trainverify.engine.options import Options
from trainverify.verify import verify_scripts

TRAIN = textwrap.dedent('''
    import os, sys
    import torch
    import torch.distributed as dist
    from torch import nn

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))[rank::world]
    for step in range(2):
        loss = model(x).square().mean()
        loss.backward()
        if "halved" in sys.argv:
            for p in model.parameters():
                p.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and "mean" in sys.argv:
            print((mean / world).item())
        if "placeholder" in sys.argv:
            print((mean / world if rank == world - 1 else mean - 1).item())
        if rank == 0 and "first" in sys.argv or "every" in sys.argv:
            print(loss.item())
''')


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """Verdict of each output of the script with some arguments, against the script with others on one device."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)

    def run(reference, parallel=None, **more):
        report = verify_scripts(parse_scripts(f"train.py {reference}", f"train.py {reference if parallel is None else parallel}", 2, **more),
                                Options(steps=1, timeout=60, jobs=1, repair=False))
        return report, {(o.kind, o.name): o.verdict for o in report.outputs}
    return run


def test_the_data_of_another_routing(verdicts, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN.replace("manual_seed(1)", "manual_seed(int(sys.argv[1]))").replace("for step", "print('seed', sys.argv[1], os.environ['TRAINVERIFY_ROUTING'], file=open('seeds', 'a'))\nfor step"))
    report = verify_scripts(parse_scripts("train.py {routing} mean", "train.py {routing} mean", 2), Options(steps=1, timeout=60, jobs=1, repair=False, routing=2))
    assert report.verdict == "PROVED" and set((tmp_path / "seeds").read_text().split("\n")) == {"seed 2 2", ""}
    assert "--routings 3" in report.rerun and report.rerun.count("{routing}") == 2


def test_a_loss_that_only_rank_0_prints(verdicts):
    report, held = verdicts("mean first")
    assert held.pop(("scalar", "loss")) == "UNKNOWN" and [d.code for d in report.diagnostics] == ["REL006"]
    assert held == {("scalar", "mean / world"): "PROVED", **{(kind, name): "PROVED" for kind in ("gradient", "parameter") for name in ("weight", "bias")}}
    assert report.rerun.endswith("--seed 0 -- train.py mean first")


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "more", "verdict"), [
    ("every", {}, "UNKNOWN"), ("every", {"local": ["loss=mean"]}, "PROVED"), ("every", {"local": ["loss=sum"]}, "REFUTED"), ("first", {"skip": ["loss"]}, "PROVED")])
def test_a_loss_that_is_a_share(verdicts, arguments, more, verdict):
    report, held = verdicts(arguments, **more)
    assert (report.verdict, held.get(("scalar", "loss"))) == (verdict, None if "skip" in more else verdict)


@pytest.mark.slow
def test_a_number_that_stands_for_a_loss_elsewhere(verdicts):
    """As a pipeline's first rank prints -1."""
    report, held = verdicts("placeholder")
    assert [v for (kind, _), v in held.items() if kind == "scalar"] == ["UNKNOWN"] and [d.code for d in report.diagnostics] == ["REL006"]


@pytest.mark.slow
def test_a_wrong_script(verdicts):
    report, held = verdicts("", "halved")
    assert report.verdict == "REFUTED" and {held[k, n] for k in ("gradient", "parameter") for n in ("weight", "bias")} == {"REFUTED"}
    span = report.findings[0].diagnostic.span
    assert span.file.endswith("train.py") and TRAIN.splitlines()[span.line - 1].strip() == "p.grad /= 2"
