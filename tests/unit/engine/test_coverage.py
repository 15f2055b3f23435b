"""Which samples of the batch are read: sampler padding, dropped remainders, wrong slices, data that leaves for Python."""
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import trainverify as tv
from trainverify.engine.options import Options
from trainverify.verify import verify_spec

HERE = Path(__file__).parent
IGNORE = -100


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11, bias=False)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def training(model, parts):
    """One step over the parts (tokens and labels of each), with the mean loss over all of the rank's tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        total = 0.0
        for tokens, labels in parts:
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": tv.local(total)}
    return tv.Training(model, step)


def make_batch(rows):
    batch = {"tokens": torch.arange(3 * rows).reshape(rows, 3) % 11, "labels": torch.arange(3 * rows).reshape(rows, 3) % 7}
    for row in range(rows):
        batch["labels"][row, : row % 3] = IGNORE
    return batch


def run(share, *, rows=6, ranks=2):
    """Verify a program in which each rank reads share(batch, rank, world): a list of (tokens, labels)."""
    def reference():
        torch.manual_seed(0)
        model, b = Model(), make_batch(rows)
        made = training(model, [(b["tokens"], b["labels"])])
        return tv.Training(made.model, made.step, batch=b)

    def parallel(ref):
        dist.init_process_group("gloo")
        model = Model()
        model.load_state_dict(ref.weights)
        return training(model, share(ref.batch, dist.get_rank(), dist.get_world_size()))

    return tv.verify(reference, parallel, ranks=ranks, steps=1, timeout=60.0)


def found(report, code):
    return [d for d in report.diagnostics if d.code == code]


def chunked(batch, rank, world):
    return list(zip(*(batch[k].chunk(world)[rank].chunk(1) for k in ("tokens", "labels"))))


def test_each_sample_once():
    report = run(chunked)
    assert report.data == "6 samples, each read once; valid tokens 6, 6"
    assert not found(report, "DATA001") and not found(report, "DATA002")


@pytest.mark.slow
def test_microbatches_of_a_rank():
    report = run(lambda b, rank, world: list(zip(*(b[k].chunk(world)[rank].split(1) for k in ("tokens", "labels")))))
    assert report.data == "6 samples, each read once; valid tokens (3, 2, 1), (3, 2, 1)"


def test_ranks_that_read_the_same_are_replicas():
    report = run(lambda b, rank, world: [(b["tokens"], b["labels"])], ranks=3)
    assert report.data == "6 samples, each read once; valid tokens 12"
    assert not found(report, "DATA002")


def test_dropped_remainder():
    def dropped(b, rank, world):
        n = len(b["tokens"]) // world
        return [(b["tokens"][rank * n: rank * n + n], b["labels"][rank * n: rank * n + n])]
    report = run(dropped, rows=7)
    assert report.data.startswith("7 samples: sample 6 never read")
    (d,) = found(report, "DATA001")
    assert "sample 6" in d.message and "batch['tokens'], batch['labels']" in d.message and d.severity == "warning"


def test_padding_of_a_sampler():
    def sampled(b, rank, world):
        at = torch.utils.data.DistributedSampler(range(len(b["tokens"])), world, rank, shuffle=False)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(b["tokens"], b["labels"]), batch_size=2, sampler=at)
        return list(loader)
    report = run(sampled, rows=7)
    (d,) = found(report, "DATA002")
    assert "sample 0" in d.message and d.ranks == (0, 1), d
    assert report.data.startswith("7 samples: sample 0 read more often than others")


@pytest.mark.slow
def test_one_rank_reads_a_microbatch_twice():
    def twice(b, rank, world):
        parts = chunked(b, rank, world)
        return parts * 2 if rank else parts
    (d,) = found(run(twice), "DATA002")
    assert "samples 3-5" in d.message and d.ranks == (1,)


@pytest.mark.parametrize("used", [False, True])
def test_a_microbatch_that_is_run_for_its_shapes_only(used):
    """As pipelines do in their first step, with the communication of tensor parallelism in it; it counts if anything is made of it."""
    def reference():
        torch.manual_seed(0)
        model, b = Model(), make_batch(6)
        made = training(model, [(b["tokens"], b["labels"])])
        return tv.Training(made.model, made.step, batch=b)

    def parallel(ref):
        dist.init_process_group("gloo")
        model = Model()
        model.load_state_dict(ref.weights)
        parts = list(zip(*(ref.batch[k].chunk(2)[dist.get_rank()].split(1) for k in ("tokens", "labels"))))
        made = training(model, parts)

        def step():
            tokens, labels = parts[0]
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            (first,) = torch.autograd.grad(loss, model.head.weight)
            dist.all_reduce(first)
            norm = first.norm()
            return {**made.step(), **({"norm": norm} if used else {})}
        return tv.Training(made.model, step)

    report = tv.verify(reference, parallel, ranks=2, steps=1, timeout=60.0, dry_run=True)
    assert [d.message.split(" read")[0] for d in found(report, "DATA002")] == (["batch['labels']: samples 0, 3"] if used else [])
    assert report.data.startswith("6 samples: samples 0, 3 read more often" if used else "6 samples, each read once")


def test_a_microbatch_in_the_place_of_another():
    def stale(b, rank, world):
        parts = list(zip(*(b[k].chunk(world)[rank].split(1) for k in ("tokens", "labels"))))
        return [parts[0]] * len(parts)
    report = run(stale)
    (d,) = found(report, "DATA001")
    assert "samples 1-2, 4-5" in d.message


def test_copies_indices_and_communication_are_followed():
    def moved(b, rank, world):
        both = torch.stack([b["tokens"], b["labels"]], 1).to(torch.int32)
        mine = torch.zeros(3, 2, 3, dtype=torch.int32)
        order = torch.tensor([5, 0, 2, 1, 4, 3])
        dist.scatter(mine, list(both[order].chunk(2)) if rank == 0 else None, src=0)
        part = torch.cat([mine[1:], mine[:1]]).clone()
        return [(part[:, 0].long(), torch.where(part[:, 1] == IGNORE, IGNORE, part[:, 1]).long())]
    report = run(moved)
    assert report.data.startswith("6 samples, each read once; valid tokens "), report.data
    assert not found(report, "DATA001") and not found(report, "DATA002")


@pytest.mark.slow
def test_messages_are_followed():
    def sent(b, rank, world):
        parts = chunked(b, 0, 1)[0]
        if rank == 0:
            for part in parts:
                dist.send(part[3:].contiguous(), 1)
            return [(parts[0][:3], parts[1][:3])]
        mine = [torch.zeros(3, 3, dtype=torch.int64) for _ in parts]
        for part in mine:
            dist.recv(part, 0)
        return [tuple(mine)]
    assert run(sent).data == "6 samples, each read once; valid tokens 6, 6"


@pytest.mark.slow
def test_what_one_rank_logs_is_no_repetition():
    def logged(b, rank, world):
        parts = chunked(b, rank, world)
        if rank == 0:
            (parts[0][0] + 1).sum()
        return parts
    assert not found(run(logged), "DATA002")


@pytest.mark.slow
def test_unpadded_rows_are_read():
    """Elements that the reference ignores need not be read; a sample counts as read by any of its elements."""
    def first_two(b, rank, world):
        (tokens, labels), = chunked(b, rank, world)
        return [(tokens[:, 1:], labels[:, 1:])]
    assert not found(run(first_two), "DATA001")


def test_data_that_leaves_for_python_is_not_judged():
    def listed(b, rank, world):
        return [(torch.tensor(b["tokens"].chunk(world)[rank].tolist()), b["labels"].chunk(world)[rank])]
    report = run(listed)
    assert not found(report, "DATA001")
    (d,) = found(report, "DATA003")
    assert "batch['tokens']" in d.message and "tolist" in d.message and "test_coverage.py" in d.message
    assert "batch['tokens'] not followed" in report.data


def test_own_data():
    report = run(lambda b, rank, world: chunked(make_batch(6), rank, world))
    (d,) = found(report, "DATA001")
    assert "no sample of ref.batch" in d.message and "none read from ref.batch" in report.data


def test_float_batch():
    def reference():
        torch.manual_seed(0)
        model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        return tv.Training(model, step_of(model, x), batch=x)

    def step_of(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": tv.local(loss)}
        return step

    def parallel(ref):
        dist.init_process_group("gloo")
        model = torch.nn.Linear(3, 2)
        model.load_state_dict(ref.weights)
        return tv.Training(model, step_of(model, ref.batch[dist.get_rank(): dist.get_rank() + 2]))

    report = tv.verify(reference, parallel, ranks=2, steps=1, timeout=60.0)
    assert report.data == "4 samples: sample 3 never read, sample 1 read more often than others"


def test_dry_run(tmp_path):
    spec = tmp_path / "spec.py"
    spec.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom test_coverage import *\nRANKS = 2\n"
                    "def reference():\n    torch.manual_seed(0)\n    m, b = Model(), make_batch(6)\n"
                    "    t = training(m, [(b['tokens'], b['labels'])])\n    return tv.Training(t.model, t.step, batch=b)\n"
                    "def parallel(ref):\n    m = Model()\n    m.load_state_dict(ref.weights)\n"
                    "    return training(m, chunked(ref.batch, dist.get_rank(), 2))\n")
    report = verify_spec(spec, Options(dry_run=True, steps=1))
    assert (report.verdict, report.mode, report.exit_code, report.outputs) == ("UNKNOWN", "dry-run", 3, [])
    assert report.data == "6 samples, each read once; valid tokens 6, 6"
    assert report.bound == (2, 2) and {(b.name, b.rank, b.source) for b in report.bindings} >= {("embed.weight", 1, "embed.weight")}


def test_reinterpreted_bytes_count_as_read():
    def complex_batch(x):
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            (model(x.abs()).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return tv.Training(model, step, batch=x)

    def reference():
        torch.manual_seed(0)
        return complex_batch(torch.randn(4, 3, dtype=torch.complex64))

    def parallel(ref):
        made = complex_batch(torch.view_as_complex(torch.view_as_real(ref.batch) * 1))
        made.model.load_state_dict(ref.weights)
        return made

    report = tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0)
    assert report.data == "4 samples, each read once" and not found(report, "DATA001"), report.diagnostics
