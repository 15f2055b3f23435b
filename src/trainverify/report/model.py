"""The one report model behind every format (text, json, ...). Plain data, no torch; the JSON schema is generated from it."""
from __future__ import annotations

import msgspec

from trainverify.diagnostics import Diagnostic, Span

SCHEMA_VERSION = 1
VERDICTS = ("PROVED", "REFUTED", "UNKNOWN", "ERROR")


class OutputResult(msgspec.Struct, frozen=True):
    """Verdict on one output. kind: scalar, gradient, parameter, buffer, state; name as in the reference; ranks that hold it.

    reason says why it is not PROVED; layout is what was found ("shard(dp) x replicate(tp)", "replicated"); algebra is what is
    wrong in algebra ("2 x the reference"); finding is the index of the finding that explains it, or -1.
    """

    kind: str
    name: str
    step: int
    ranks: tuple[int, ...]
    verdict: str
    reason: str = ""
    layout: str = ""
    algebra: str = ""
    finding: int = -1


class Witness(msgspec.Struct, frozen=True):
    """Concrete values, replayed in float64, on which the sides differ."""

    output: str                               # "norm.weight.grad[0], step 1"
    reference: float
    parallel: tuple[tuple[int, float], ...]   # (rank, value)


class Operand(msgspec.Struct, frozen=True):
    """An operand of the operation that a finding names: its role, shape and lineage in words."""

    role: str                                 # "input 0", "result"
    shape: tuple[int, ...]
    dtype: str
    lineage: str


class Repair(msgspec.Struct, frozen=True):
    """A change of the recorded calls under which the outputs that a finding explains become equal: what to change and where. It is
    verified if all of them are PROVED with it (the others equal the reference in the field)."""

    text: str
    verified: bool
    proved: int                               # outputs that are PROVED with it
    outputs: int                              # of the outputs that the finding explains

    def __str__(self) -> str:
        return f"{self.text}: " + ("verified" if self.verified else "makes them equal in the field, not proved")


class Finding(msgspec.Struct, frozen=True):
    """One cause: the first operation whose inputs agree with the reference and whose result does not (or a fault of the program)."""

    diagnostic: Diagnostic
    op: str = ""
    modules: tuple[str, ...] = ()
    used_at: tuple[Span, ...] = ()
    algebra: str = ""
    operands: tuple[Operand, ...] = ()
    explains: int = 0                         # number of outputs
    witnesses: tuple[Witness, ...] = ()
    diagnosis: str = ""                       # its class: multiple, partial sum, permutation, other tensor, reweighted, additive term, stale, ...
    repair: Repair | None = None              # that was tried and found to mend it


class Step(msgspec.Struct, frozen=True):
    """One value on both sides, replayed in float64 on a counterexample's inputs: some of its elements, written as numbers."""

    what: str                                 # "aten.mm.default", "norm.weight.grad, step 1"
    place: str                                # of the parallel operation
    reference_place: str                      # "" where the reference has no such value
    elements: tuple[str, ...]                 # "[0, 3]"
    expected: tuple[tuple[int, tuple[str, ...]], ...]    # of the reference, in place of each rank's; () if it has nothing
    found: tuple[tuple[int, tuple[str, ...]], ...]       # (rank, values)
    same: bool


class Counterexample(msgspec.Struct, frozen=True):
    """Inputs on which the sides differ, minimised where that is possible, and both sides' values up to the first difference."""

    inputs: tuple[tuple[str, str], ...]       # the first of those that are not zero: ("norm.weight[3]", "2")
    nonzero: int
    elements: int                             # of all float inputs
    trials: int                               # replays that it took
    minimised: bool
    note: str                                 # why the recorded inputs were kept, if they were
    steps: tuple[Step, ...]
    script: str = ""                          # file that reproduces it


class PlantedBug(msgspec.Struct, frozen=True):
    """A bug that was planted in the recorded program and that no compared output would have shown."""

    kind: str                                 # collective dropped, other factor, update dropped, ...
    text: str                                 # "all_reduce dropped"
    place: str
    ranks: tuple[int, ...]
    why: str                                  # "its result is the same here"


class SelfTest(msgspec.Struct, frozen=True):
    """How many bugs that were planted in the program this spec would have shown, without proofs. Some planted bugs change nothing in any spec."""

    planted: int = 0
    revealed: int = 0
    witnessed: int = 0                        # of those revealed: float64 shows them at the recorded inputs (REFUTED; the others are UNKNOWN)
    kinds: tuple[tuple[str, int, int], ...] = ()     # (kind, planted, revealed)
    hidden: tuple[PlantedBug, ...] = ()
    unreached: tuple[str, ...] = ()           # outputs that no planted bug changes: "gradient layers.0.wq.weight"
    outputs: int = 0                          # compared, those of all steps as one
    replayed: int = 0                         # calls
    note: str = ""                            # why nothing was planted


class Lineage(msgspec.Struct, frozen=True):
    """What one float result of a rank holds of the reference. kind: replicate, shard, permuted, joined (elements of several values), partial, scaled,
    constant, inner (a value inside an operation of the reference), empty, unaligned, unknown (too large to be looked at)."""

    rank: int
    index: int                                # of the call in the rank's trace
    op: str
    place: str
    phase: str
    step: int
    shape: tuple[int, ...]
    dtype: str
    kind: str
    dims: tuple[int, ...]                     # of the reference's value, that a shard divides
    part: str                                 # "[0:8, :] of [16, 4]"
    group: tuple[int, ...]                    # ranks over which the sum is the reference's, of a partial value
    factor: str                               # "1", "1/2"
    reference_op: str                         # or the name of a weight or an input
    reference_place: str
    text: str


class LineageTable(msgspec.Struct, frozen=True):
    """The lineages of one run."""

    spec: str
    case: dict[str, str | int | float | bool]
    ranks: int
    steps: int
    seed: int
    lineages: list[Lineage]
    diagnostics: list[Diagnostic] = []


class Assumption(msgspec.Struct, frozen=True):
    """Something the verdict rests on; places are source lines or names."""

    code: str                                 # A1, A2, ...
    text: str
    places: tuple[str, ...] = ()


class DimClass(msgspec.Struct, frozen=True):
    """Dimensions that have the same indices: their size as recorded and reduced, some of those that are joined, and why it is pinned."""

    name: str                                 # "hidden"; "" where nothing names it
    size: int
    reduced: int
    joins: tuple[str, ...]                    # "embed.weight[1]"
    pinned: str = ""
    many: int = 1                             # classes of which all this can be said


class Reduction(msgspec.Struct, frozen=True):
    """The sizes at which the programs were verified in place of the recorded ones."""

    classes: list[DimClass]
    pins: list[str] = []
    replaced: int = 0                         # integer results that were taken from the recorded programs
    needed: int = 0                           # what the proof needs of every reduced class
    cross_checked: bool = False               # verified at a second reduction too


class Phase(msgspec.Struct, frozen=True):
    name: str                                 # capture reference, capture parallel, conformance, replay, compare, ...
    seconds: float
    detail: str = ""


class Binding(msgspec.Struct, frozen=True):
    """Which reference elements one parallel parameter holds (per rank)."""

    name: str
    rank: int
    shape: tuple[int, ...]
    source: str                               # "layers.0.wq.weight[0:8, :]"
    elements: int
    bound: int                                # elements that are reference elements (the rest is padding or unbound)


class Report(msgspec.Struct):
    """Everything one run established."""

    verdict: str = "UNKNOWN"
    spec: str = ""
    case: dict[str, str | int | float | bool] = {}
    ranks: int = 0
    mesh: str = ""                            # "dp=3 x tp=2" where known
    steps: int = 0
    seed: int = 0
    outputs: list[OutputResult] = []
    findings: list[Finding] = []
    diagnostics: list[Diagnostic] = []        # faults, coverage, bindings, everything that is no difference
    warnings: list[Diagnostic] = []           # weak spec
    assumptions: list[Assumption] = []
    not_run: list[str] = []
    bindings: list[Binding] = []
    bound: tuple[int, int] = (0, 0)           # parameters bound to reference elements, of all
    data: str = ""                            # "12 samples, each read once; valid tokens 61, 48, 55"
    evidence: str = ""                        # "equal at 2 field points, error <= 2^-40"
    phases: list[Phase] = []
    ops: int = 0
    elements: int = 0
    peak_memory: int = 0                      # bytes, PSS over all processes
    seconds: float = 0.0
    rerun: str = ""
    versions: dict[str, str] = {}
    schema_version: int = SCHEMA_VERSION
    counterexample: Counterexample | None = None     # where one was asked for
    self_test: SelfTest | None = None                # where one was asked for
    reduction: Reduction | None = None               # where one was asked for
    mode: str = "verify"                      # verify, dry-run (nothing was compared), capture
    routing: int = 0                          # which of several draws of the symbols' values (0: near the initial ones)

    @property
    def exit_code(self) -> int:
        """0 PROVED, 1 REFUTED or the program faulted, 3 UNKNOWN, 4 our own error (2, usage, never reaches a report).

        A capture that worked is 0: it was asked for traces, not for a verdict.
        """
        if self.mode == "capture" and self.verdict != "ERROR":
            return 0
        if self.verdict == "ERROR":
            return 4 if any(d.severity == "internal" for d in self.diagnostics) else 1
        return {"PROVED": 0, "REFUTED": 1, "UNKNOWN": 3}[self.verdict]

    def count(self, verdict: str) -> int:
        return sum(o.verdict == verdict for o in self.outputs)

    def equal_only(self, output: OutputResult) -> bool:
        """Whether an unknown output is equal in the field without reserve, and only a proof is missing (which is no pass)."""
        return output.verdict == "UNKNOWN" and output.reason.startswith("equal ") and ", but " not in output.reason

    def unexplained(self) -> list[OutputResult]:
        """Unknown outputs of which a reader must be told why: all, but beside a difference not those that only lack a proof."""
        return [o for o in self.outputs if o.verdict == "UNKNOWN" and (self.verdict != "REFUTED" or not self.equal_only(o))]

    @property
    def label(self) -> str:
        """"spec.py[tp=2]": which run this is."""
        case = ",".join(f"{k}={v}" for k, v in self.case.items())
        return (self.spec or "functions") + (f"[{case}]" if case else "") + (f" routing {self.routing + 1}" if self.routing else "")


class Suite(msgspec.Struct):
    """Several runs told together: the cases of a spec, or all specs of a project."""

    reports: list[Report] = []
    seconds: float = 0.0
    rerun: str = ""
    versions: dict[str, str] = {}
    schema_version: int = SCHEMA_VERSION

    @property
    def worst(self) -> Report | None:
        """The first run of the worst kind: REFUTED over program fault over internal error over UNKNOWN over PROVED."""
        return min(self.reports, key=lambda r: _WORST.index((r.verdict, r.exit_code if r.verdict == "ERROR" else 0)), default=None)

    @property
    def verdict(self) -> str:
        return self.worst.verdict if self.worst is not None else "UNKNOWN"

    @property
    def exit_code(self) -> int:
        return self.worst.exit_code if self.worst is not None else 3

    def count(self, verdict: str) -> int:
        return sum(r.verdict == verdict for r in self.reports)


_WORST = (("REFUTED", 0), ("ERROR", 1), ("ERROR", 4), ("UNKNOWN", 0), ("PROVED", 0))
