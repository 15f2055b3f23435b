"""What to do about a finding for which no repair was found, by its class (no torch, not trusted)."""
from __future__ import annotations

from trainverify.report.model import Finding

_BY_CLASS = {
    "multiple": "look between this line and where the value is used for a sum that is made twice or not divided, or a factor that one side alone has",
    "partial sum": "sum it over these ranks once, before it is first used as a whole; if it is summed later, look for a use that comes before that",
    "permutation": "compare offsets, indices and the order of ranks at this line with the reference's",
    "other tensor": "find out which tensor arrives here: a wrong slice, a wrong peer, or a buffer that was overwritten",
    "reweighted": "divide by the count over all ranks and microbatches in place of each share's own",
    "additive term": "follow the term that is named: it is added once too often, or never arrives",
    "wrong group": "look at the process group of this reduction, and at the ranks that it was made of",
    "stale": "the value is read before it is made: look for a missing wait, a buffer that is used again, or a copy in the wrong order",
    "never updated": "see that the optimizer holds this very parameter and that it has a gradient when the optimizer steps",
    "uninitialised": "wait for the communication that fills this memory, or fill it, before it is read",
    "decision": "make both sides decide by the same values: what is compared here is not what the reference compares",
    "other": "compare what goes in and comes out here, listed below, with the same line of the reference",
}


def advice(f: Finding) -> str:
    """"" where the finding says itself what to do, or nothing is known of its class."""
    return "" if f.repair is not None or f.diagnostic.fix or f.diagnostic.severity != "error" else _BY_CLASS.get(f.diagnosis, "")
