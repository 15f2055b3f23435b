"""The verdict rules: what each output's evidence amounts to (trusted).

REFUTED needs a difference in the field under two seeds and a float64 witness larger than rounding of constants explains (at the recorded inputs,
else at others that take the same decisions: engine/inputs.py), or a NaN that the reference lacks; of a program of very many calls that no float decides
anything in, a difference in float64 that is larger than any rounding. PROVED needs equality in the field with nothing
against it (of a program of many calls: in float64), and the kernel's proof. Equality in the field alone is UNKNOWN. A difference without a
witness is UNKNOWN.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from trainverify.diagnostics import Diagnostic
from trainverify.engine.proof import Proof
from trainverify.relate.compare import Compared, Piece

EXACT, ROUNDED = 1e-10, 1e-5                  # relative thresholds of a witness, without and with rounded constants
FAR, NOTHING = 1e-3, 1e-6                     # relative: what no rounding explains; which part of the largest number of its sort an output must have
OPAQUE = {"OPS001", "OPS002", "OPS003", "OPS004", "OPS005", "OPS006", "CAP006"}   # values without a known meaning: garbage, which is nobody's NaN and nobody's memory
BLOCKING = {"REL007", "REL008", "CONF001", "CONF002", "CAP001"} | OPAQUE
DISTRUSTED = {"CONF001", "CONF002"}           # the replay is not what ran: its witnesses show nothing
TIE = "REL011"                                # the runs took different paths for rounding alone: a difference shows nothing


@dataclass(slots=True)
class Wrong:
    """Where one piece differs: flat indices into it, both sides' float64 values there, and whether it is a NaN."""

    piece: Piece
    index: torch.Tensor
    reference: torch.Tensor
    parallel: torch.Tensor
    nan: bool


@dataclass(slots=True)
class Judgement:
    """One output's verdict with its evidence. unsure: pieces that differ in the field without a witness; inputs: the symbols' values at
    which it differs, where those are not the recorded ones."""

    compared: Compared
    verdict: str
    code: str = ""
    reason: str = ""
    wrong: list[Wrong] = field(default_factory=list)
    unsure: list[Piece] = field(default_factory=list)
    inputs: torch.Tensor | None = None

    @property
    def key(self):
        return self.compared.key


def judge(first, second, diagnostics: list[Diagnostic], proof: Proof) -> list[Judgement]:
    """Judge every output of the reference. `first` and `second` are engine.analysis.Pass (second: None if nothing differed)."""
    threshold = ROUNDED if first.field.rounding or _rounded_data(first) else EXACT
    blocked = sorted({d.code for d in diagnostics if d.code in BLOCKING})
    opaque = sorted({d.code for d in diagnostics if d.code in OPAQUE})
    tied = any(d.code == TIE for d in diagnostics)
    bits = first.field.error_bits
    out = []
    for key, c in first.comparison.compared.items():
        again = second.comparison.compared[key] if second else None
        j = _judge_one(c, again, threshold, blocked, opaque, tied)
        out.append(j if j.verdict else _proved_or_not(c, proof, bits))
    return out


def agrees(piece: Piece, within: float = ROUNDED) -> bool:
    """Whether float64 has the same on both sides at the recorded inputs, up to a part of the largest number: what rounding of constants explains."""
    a, b = piece.reference["real"].t.reshape(-1), piece.parallel["real"].t.reshape(-1)
    scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    return bool(((a == b) | ((a - b).abs() <= within * scale)).all())


def judge_by_numbers(done) -> list[Judgement]:
    """Judgements by float64 alone (`done`: engine.passes.Pass without a field): REFUTED where outputs differ, and one of them by far; UNKNOWN where they do
    not. None where that shows nothing: no output differs by far, or floats decided something, which rounding may have turned over."""
    compared = done.comparison.compared
    if any(machine.decisions for w in (done.reference, done.parallel) for machine in w.machines):
        return []
    largest: dict[str, float] = {}
    for (kind, *_), c in compared.items():
        largest[kind] = max(largest.get(kind, 0.0), *(_scale(p.reference["real"].t) for p in c.pieces), 0.0)
    out = [_judged_by_numbers(c, NOTHING * largest[key[0]]) for key, c in compared.items()]
    far = any(((w.reference - w.parallel).abs() > FAR * max(_scale(w.piece.reference["real"].t), NOTHING * largest[j.key[0]])).any()
              for j in out if j.verdict == "REFUTED" for w in j.wrong)
    return out if far else []


def _judged_by_numbers(c: Compared, least: float) -> Judgement:
    wrongs = []
    for piece in c.pieces:
        a, b = piece.reference["real"].t.reshape(-1), piece.parallel["real"].t.reshape(-1)
        at = torch.nonzero(torch.isfinite(a) & torch.isfinite(b) & ((a - b).abs() > ROUNDED * max(_scale(a), least))).reshape(-1)
        if len(at):
            wrongs.append(Wrong(piece, at, a[at], b[at], False))
    if not wrongs:
        same = bool(c.pieces) and not c.missing and not c.problems and all(map(agrees, c.pieces))
        return Judgement(c, "UNKNOWN", "", f"float64 {'has the same' if same else 'does not decide it'}; others differ by far, and nothing was proved of the rest")
    if c.reference.kind == "scalar" and (how := _is_share(c)):
        return Judgement(c, "UNKNOWN", "REL006", f"rank-local scalar: the {how} over the ranks is the reference's; declare it with tv.local(x, reduce=\"{how}\")")
    if why := _may_be_a_share(c, len(wrongs)):
        return Judgement(c, "UNKNOWN", "REL006", why)
    return Judgement(c, "REFUTED", "REL001", "differs from the reference", wrongs)


def _scale(t: torch.Tensor) -> float:
    """The largest finite number."""
    return float(t[t.isfinite()].abs().max()) if t.isfinite().any() else 0.0


def at_other_inputs(judgements: list[Judgement], first, diagnostics: list[Diagnostic], find: Callable) -> list[Judgement]:
    """The same judgements, those without a witness REFUTED where other inputs give one. find(pieces by output, rounded) -> {output: Witness}.
    It is not asked where an output is refuted anyway, nor where anything withholds a verdict."""
    wanted = {j.key: [k for k, p in enumerate(j.compared.pieces) if any(p is u for u in j.unsure)] for j in judgements
              if j.code == "REL001" and j.unsure and not _garbage(j.compared) and not _is_undeclared(j.compared)}
    if not wanted or any(j.verdict == "REFUTED" for j in judgements) or any(d.code in BLOCKING or d.code == TIE for d in diagnostics):
        return judgements
    found = find(wanted, bool(first.field.rounding) or _rounded_data(first))
    out = []
    for j in judgements:
        if (witness := found.get(j.key)) is None:
            out.append(j)
            continue
        wrong = [Wrong(j.compared.pieces[k], at, a, b, False) for k, (at, a, b) in witness.found.items()]
        out.append(Judgement(j.compared, "REFUTED", "REL001", f"differs from the reference at other inputs, with the same decisions: {witness.how}", wrong, inputs=witness.inputs))
    return out


def _is_undeclared(c: Compared) -> bool:
    """A scalar of several ranks, or one that a script happens to read, may be a share: that it differs shows nothing."""
    return c.reference.kind == "scalar" and any(not p.recorded.declare and (len(c.pieces) > 1 or p.recorded.call.kwargs.get("read")) for p in c.pieces)


def _proved_or_not(c: Compared, proof: Proof, bits: int) -> Judgement:
    """An output that is equal in the field, with nothing against it."""
    if c.key in proof.proved:
        return Judgement(c, "PROVED")
    withheld = ", ".join(sorted({d.code for d in proof.diagnostics}))
    why = f"see {withheld}" if withheld else proof.reasons.get(c.key, "")
    return Judgement(c, "UNKNOWN", "", f"equal at 2 field points, error <= 2^-{bits}" + (f"; {why}" if why else ""))


def _rounded_data(first) -> bool:
    """Whether a side computes with numbers that are rounded results: float data, or floats that left tensors for Python."""
    machines = [*first.reference.machines, *first.parallel.machines]
    return any(m.memory["real"].rounded or not all(map(first.field.is_const, m.scalars["field"].values())) for m in machines)


def _judge_one(c: Compared, again: Compared | None, threshold: float, blocked: list[str], opaque: list[str], tied: bool) -> Judgement:
    wrongs, doubtful, unsure = [], 0, []
    for k, piece in enumerate(c.pieces):
        twin = again.pieces[k] if again is not None else None
        found, unwitnessed = _differences(piece, twin, threshold, bool(opaque))
        if found is not None:
            wrongs.append(found)
        doubtful += unwitnessed
        unsure += [piece] if unwitnessed else []
    if wrongs and c.reference.kind == "scalar" and _is_share(c):
        how = _is_share(c)
        return Judgement(c, "UNKNOWN", "REL006", f"rank-local scalar: the {how} over the ranks is the reference's; "
                         f"declare it with tv.local(x, reduce=\"{how}\")", wrongs)
    if wrongs and (why := _may_be_a_share(c, len(wrongs))):
        return Judgement(c, "UNKNOWN", "REL006", why, wrongs)
    distrusted = sorted(DISTRUSTED & set(blocked))
    if wrongs and distrusted:
        return Judgement(c, "UNKNOWN", distrusted[0], f"differs in the replay, but see {', '.join(distrusted)}")
    if wrongs and tied:
        return Judgement(c, "UNKNOWN", TIE, f"differs, but a choice fell differently at a tie up to rounding: see {TIE}")
    if wrongs:
        code = "REL010" if all(w.nan for w in wrongs) else "REL001"
        return Judgement(c, "REFUTED", code, "differs from the reference", wrongs)
    if c.problems:
        return Judgement(c, "UNKNOWN", "REL005", "; ".join(dict.fromkeys(c.problems)))
    if c.missing:
        return Judgement(c, "UNKNOWN", "REL005", "no rank has it" if c.missing < 0 else f"{c.missing} of its elements are on no rank")
    if doubtful:
        if opaque and _garbage(c):
            return Judgement(c, "UNKNOWN", opaque[0], f"{doubtful} elements have no known meaning: see {', '.join(opaque)}")
        if _garbage(c):
            return Judgement(c, "UNKNOWN", "REL009", f"{doubtful} elements depend on uninitialised memory", unsure=unsure)
        return Judgement(c, "UNKNOWN", "REL001", f"{doubtful} elements differ in the field but no float64 witness was found", unsure=unsure)
    if blocked:
        return Judgement(c, "UNKNOWN", blocked[0], f"equal in the field, but see {', '.join(blocked)}")
    return Judgement(c, "")


def _differences(piece: Piece, twin: Piece | None, threshold: float, opaque: bool) -> tuple[Wrong | None, int]:
    """(a witnessed difference, number of elements that differ in both fields without a witness)."""
    a, b = piece.reference["real"].t, piece.parallel["real"].t
    differ = ~piece.equal["field"]
    if twin is not None:
        differ &= ~twin.equal["field"]
    nan = torch.isnan(b) & torch.isfinite(a)
    finite = torch.isfinite(a) & torch.isfinite(b)
    scale = float(a[finite].abs().max()) if finite.any() else 0.0
    large = differ & finite & ((a - b).abs() > threshold * max(scale, 1e-30))
    witnessed = large
    if witnessed.any():
        at = torch.nonzero(witnessed).reshape(-1)
        return Wrong(piece, at, a[at], b[at], False), 0
    if nan.any() and not opaque and not _is_garbage(piece, nan):
        at = torch.nonzero(nan).reshape(-1)
        return Wrong(piece, at, a[at], b[at], True), 0
    return None, int((differ | nan).sum())


def _is_garbage(piece: Piece, where: torch.Tensor) -> bool:
    sp = getattr(piece.parallel["field"], "sp", None)
    return sp is not None and bool((sp.reshape(-1)[where] == GARBAGE).any())


def _garbage(c: Compared) -> bool:
    return any(_is_garbage(p, torch.ones(len(p.at), dtype=torch.bool)) for p in c.pieces)


def _is_share(c: Compared) -> str:
    """"mean" or "sum" if the undeclared scalar's mean or sum over its ranks is the reference's value and the ranks differ."""
    values = [float(p.parallel["real"].t.reshape(-1)[0]) for p in c.pieces]
    ref = float(c.pieces[0].reference["real"].t.reshape(-1)[0])
    if len(values) < 2 or max(values) - min(values) <= 1e-9 * max(abs(v) for v in values):
        return ""
    for how, got in (("mean", sum(values) / len(values)), ("sum", sum(values))):
        if abs(got - ref) <= 1e-9 * max(abs(ref), 1e-30):
            return how
    return ""


def _may_be_a_share(c: Compared, wrongs: int) -> str:
    """Why a float that a script reads, and that differs, may be no output at all: scripts print what they like on each rank."""
    read = c.pieces[0].recorded.call.kwargs.get("read") if c.pieces else None
    if read == "some":
        return "differs, and only some ranks read it: it may be their share"
    if read and wrongs < len(c.pieces):
        return "differs on some ranks, and on others equals the reference's: they may not all mean the same by it"
    return ""


GARBAGE = 4
