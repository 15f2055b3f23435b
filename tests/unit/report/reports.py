"""Reports as the engine makes them, one per kind of outcome, for the snapshot and schema tests."""
from __future__ import annotations

from trainverify.diagnostics import Diagnostic, Span
from trainverify.report.model import Assumption, Binding, Finding, Operand, OutputResult, Phase, Report, Witness

FILE = "tests/unit/report/fixtures/norm.py"
RANKS = tuple(range(6))
EVIDENCE = "equal at 2 field points, error <= 2^-40"
UNPROVED = f"{EVIDENCE}; no proof that aten.mul.Tensor on rank 0 (train.py:12) is the reference's"
PARAMS = ("embed.weight", *[f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("norm1", "wq", "wo", "norm2", "w1")], "norm.weight")
NORMS = tuple(p for p in PARAMS if "norm" in p)


def outputs(verdict: str, reason: str = "") -> list[OutputResult]:
    rows = []
    for step in (1, 2):
        rows += [OutputResult("scalar", n, step, RANKS, verdict, reason, "replicated") for n in ("loss", "grad_norm")]
        for p in PARAMS:
            layout = "shard(dp) x replicate(tp)" if p in NORMS else "shard(dp) x shard(tp)"
            rows += [OutputResult(k, p, step, RANKS, verdict, reason, layout) for k in ("gradient", "parameter")]
            rows += [OutputResult("state", f"{p}::{s}", step, RANKS, verdict, reason, layout) for s in ("exp_avg", "exp_avg_sq")]
    return rows


def base(verdict: str, **more) -> Report:
    fields = dict(
        verdict=verdict, spec="spec.py", case={"tp": 2}, ranks=6, mesh="dp=3 x tp=2", steps=2, seed=0, bound=(12, 12),
        data="12 samples, each read once; valid tokens 61, 48, 55", seconds=14.21, peak_memory=1_300_000_000, ops=40_123, elements=3_201_222,
        rerun="trainverify verify spec.py --case tp=2 --steps 2 --seed 0", versions={"trainverify": "0.1.0", "torch": "2.13.0", "python": "3.11"},
        phases=[Phase("capture reference", 1.2), Phase("capture parallel", 6.9, "6 ranks"), Phase("replay", 4.0), Phase("compare", 0.3)],
        assumptions=[Assumption("A1", "casts are the identity: bf16 rounding is not checked"),
                     Assumption("A2", "rounding of constants: 96 values of the RoPE table", ("model/rope.py:12",))],
        not_run=["torch.compile (ran eager)"],
        warnings=[Diagnostic("WEAK011", "weight_decay is 0: a wrong one would not show", "warning", Span("spec.py", 40, "step"))],
    )
    return Report(**{**fields, **more})


def proved() -> Report:
    return base("PROVED", outputs=outputs("PROVED"))


def equal_in_field() -> Report:
    return base("UNKNOWN", outputs=outputs("UNKNOWN", UNPROVED), evidence=EVIDENCE)


def refuted() -> Report:
    def differs(o: OutputResult) -> bool:
        return not (o.step == 1 and (o.kind == "gradient" and o.name not in NORMS or o.name == "loss"))
    rows = [OutputResult(o.kind, o.name, o.step, o.ranks, "REFUTED", "", o.layout, "", 0) if differs(o) else o for o in outputs("UNKNOWN", EVIDENCE)]
    span = Span(FILE, 13, "RMSNorm.forward", "layers.0.norm1", "backward", 1, ((FILE, 21, "Block.forward"), ("train.py", 60, "step")))
    what = Diagnostic("REL002", "gradient is one rank's share; the sum over tp is missing", "error", span, RANKS)
    finding = Finding(
        what, "aten.sum.dim_IntList", tuple(p.removesuffix(".weight") for p in NORMS), (Span("train.py", 88, "clip_grad_norm_"),),
        "reference = sum over tp ranks [0, 1] of the parallel values",
        (Operand("input 0", (2, 4, 16), "float32", "sequence shard [b, s/tp, d]"), Operand("result", (16,), "float32", "partial over tp")),
        sum(map(differs, rows)),
        (Witness("norm.weight.grad[0]", 3.0, ((0, 1.0), (1, 2.0))), Witness("layers.0.norm1.weight.grad[11]", -0.125, ((0, 1e-9), (1, -0.125)))))
    return base("REFUTED", outputs=rows, findings=[finding], evidence=EVIDENCE)


def mixed_unknown() -> Report:
    rows = outputs("UNKNOWN", EVIDENCE)
    def local(o: OutputResult) -> OutputResult:
        if o.kind == "scalar" and o.name == "loss":
            return OutputResult(o.kind, o.name, o.step, (0, 1, 2), "UNKNOWN", "rank-local scalar: declare it with tv.local(x, reduce=...)", "", "", 0)
        return o
    finding = Finding(Diagnostic("REL006", "loss is reported by ranks 0-2 with different values", "warning", Span("train.py", 30, "step"), (0, 1, 2),
                                 fix='return {"loss": tv.local(loss, reduce="mean")}'), explains=2)
    return base("UNKNOWN", outputs=[local(o) for o in rows], findings=[finding], evidence=EVIDENCE,
                bindings=[Binding("embed.weight", r, (40, 16), "embed.weight[0:37, :]", 640, 592) for r in (1, 3)])


def cannot_run() -> Report:
    notes = ("ranks 0, 1: all_reduce(sum) of [64] float32 on group tp, call 12, at train.py:88 in clip",
             "rank 2: all_gather of [32] float32 on group tp, call 12, at train.py:91 in clip",
             "rank 2 is the odd one out: the others agree")
    fault = Diagnostic("RUN002", "ranks of one group call different collectives", "error", Span("train.py", 91, "clip", "", "optimizer", 1), (2,), notes,
                       "make every rank of the group reach the same call")
    return base("ERROR", diagnostics=[fault], outputs=[], assumptions=[], warnings=[], not_run=[], ops=0, bound=(0, 0), data="")


def internal() -> Report:
    fault = Diagnostic("CONF001", "the row of aten.silu disagrees with PyTorch by 0.5 at element 3", "internal", Span(FILE, 13, "RMSNorm.forward"), (0,),
                       ("recorded 1.5, row 2.0", "traces are kept in .trainverify/traces"), "attach .trainverify/traces to a bug report")
    return base("ERROR", diagnostics=[fault], outputs=[], assumptions=[], warnings=[], not_run=[])


def dry_run() -> Report:
    rows = [Binding("wq.weight", r, (8, 16), f"wq.weight[{8 * (r % 2)}:{8 * (r % 2) + 8}, :]", 128, 128) for r in range(6)]
    rows += [Binding("norm.weight", r, (16,), "norm.weight", 16, 16) for r in range(6)]
    return base("UNKNOWN", mode="dry-run", bindings=rows, bound=(2, 2), ops=0)


def captured() -> Report:
    return base("UNKNOWN", mode="capture", warnings=[], assumptions=[])


ALL = {f.__name__: f for f in (proved, equal_in_field, refuted, mixed_unknown, cannot_run, internal, dry_run, captured)}
