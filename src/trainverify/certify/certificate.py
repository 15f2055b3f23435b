"""Certificates: distinct obligations in a file that can be proved again with the kernel alone (not trusted: `recheck` asks the kernel).

A file is JSON. Each obligation is a list of nodes, each [kind, attribute, arguments], and stands under the address of its content
(`kernel.terms.digest`); a seal over all of them and the header shows damage. `recheck` proves every obligation again. That
establishes that the obligations are true, and not that they are those of a program.
"""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import msgspec

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.kernel import BUDGET, Proved, prove
from trainverify.kernel.terms import ANY, Node, Obligation, check_node, digest

FORMAT = "trainverify certificate"
VERSION = 1
ESTABLISHES = ("each obligation of the certificate holds for all real values of its leaves; "
               "that they are the obligations of a program is what the traces show, not this file")

Row = tuple[str, str | int | None, tuple[int, ...]]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One obligation; fractions are written as p/q."""

    digest: str
    nodes: tuple[Row, ...]
    lhs: int
    rhs: int
    given: tuple[tuple[int, int], ...] = ()


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file. made: what it was made from, as free text by name. budget: what the kernel may spend on one obligation."""

    format: str
    version: int
    made: dict[str, str]
    assumptions: tuple[str, ...]
    budget: int
    obligations: tuple[Entry, ...]
    seal: str


@dataclass(frozen=True, slots=True)
class Recheck:
    """The outcome: how many obligations there are, and what was rejected (CERT003 each)."""

    obligations: int
    assumptions: tuple[str, ...]
    rejected: tuple[Diagnostic, ...]
    establishes: str = ESTABLISHES

    @property
    def accepted(self) -> bool:
        return not self.rejected


def write_certificate(path: str | os.PathLike, obligations: Iterable[Obligation], assumptions: Iterable[str] = (), made: dict[str, str] | None = None,
                      budget: int = BUDGET) -> int:
    """Write the distinct obligations; their number. Raises Fault with FILE006 if the file cannot be written."""
    entries = {e.digest: e for e in map(_entry, obligations)}
    certificate = Certificate(FORMAT, VERSION, made or {}, tuple(assumptions), budget, tuple(entries[d] for d in sorted(entries)), "")
    certificate = msgspec.structs.replace(certificate, seal=_seal(certificate))
    try:
        Path(path).write_bytes(_lines(certificate))
    except OSError as e:
        raise Fault(Diagnostic("FILE006", f"{path} cannot be written: {e.strerror or e}", fix="Name a file that can be written.")) from e
    return len(entries)


def read_certificate(path: str | os.PathLike) -> Certificate:
    """A well-formed certificate with an unbroken seal; else Fault with CERT001 (not readable or damaged) or CERT002 (another version)."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise _fault("CERT001", f"{path} cannot be read: {e.strerror or e}", "Name a file that `trainverify verify --certificate` wrote.") from e
    try:
        header = msgspec.json.decode(data)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise _fault("CERT001", f"{path} is not a certificate", "Name a file that `trainverify verify --certificate` wrote.")
        if header.get("version") != VERSION:
            raise _fault("CERT002", f"{path} is of format version {header.get('version')}; this TrainVerify reads version {VERSION}")
        certificate = msgspec.json.decode(data, type=Certificate)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise _fault("CERT001", f"{path} is damaged: {e}") from e
    if _seal(certificate) != certificate.seal:
        raise _fault("CERT001", f"{path} has changed since it was written (seal)")
    return certificate


def obligation_of(entry: Entry) -> Obligation:
    """The obligation of an entry, checked against its address; ValueError if it is malformed or another one."""
    nodes = tuple(Node(kind, _attribute(kind, attr), args) for kind, attr, args in entry.nodes)
    for position, node in enumerate(nodes):
        check_node(node, position)
    if not all(0 < sign <= ANY for _, sign in entry.given):
        raise ValueError(f"what is given is malformed: {entry.given}")
    obligation = Obligation(nodes, entry.lhs, entry.rhs, entry.given)
    if digest(obligation) != entry.digest:
        raise ValueError(f"its content has the address {digest(obligation)}")
    return obligation


def recheck(path: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> Recheck:
    """Prove every obligation of a certificate again. Raises Fault as `read_certificate` does."""
    certificate = read_certificate(path)
    rejected = []
    for k, entry in enumerate(certificate.obligations, 1):
        reason = _refusal(entry, certificate.budget)
        if reason:
            rejected.append(Diagnostic("CERT003", f"{path}: obligation {entry.digest} is rejected: {reason}", fix=_FIX))
        if progress:
            progress(k, len(certificate.obligations))
    return Recheck(len(certificate.obligations), certificate.assumptions, tuple(rejected))


_FIX = "Make the certificate again with `trainverify verify --certificate`."


def _fault(code: str, message: str, fix: str = _FIX) -> Fault:
    return Fault(Diagnostic(code, message, fix=fix))


def _refusal(entry: Entry, budget: int) -> str:
    """Why an entry is not accepted, or nothing."""
    try:
        verdict = prove(obligation_of(entry), budget)
    except ValueError as e:
        return str(e)
    if isinstance(verdict, Proved):
        return ""
    return f"the kernel does not prove it ({getattr(verdict, 'reason', 'it is false')})"


def _entry(obligation: Obligation) -> Entry:
    rows = tuple((n.kind, str(n.attr) if isinstance(n.attr, Fraction) else n.attr, n.args) for n in obligation.nodes)
    return Entry(digest(obligation), rows, obligation.lhs, obligation.rhs, obligation.given)


def _attribute(kind: str, attr: str | int | None) -> Fraction | str | int | None:
    if kind not in ("const", "scl", "pow"):
        return attr
    if not isinstance(attr, str) or not re.fullmatch(r"-?[0-9]+(/[1-9][0-9]*)?", attr):
        raise ValueError(f"{attr!r} is not a fraction")
    return Fraction(attr)


def _seal(certificate: Certificate) -> str:
    content = msgspec.json.encode(msgspec.structs.replace(certificate, seal=""))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _lines(certificate: Certificate) -> bytes:
    """JSON with one obligation on a line."""
    head = msgspec.json.encode(msgspec.structs.replace(certificate, obligations=()))
    entries = b",\n".join(msgspec.json.encode(e) for e in certificate.obligations)
    return head.replace(b'"obligations":[]', b'"obligations":[\n' + entries + b"\n]", 1) + b"\n"
