"""The kernel: what an obligation means, and the only code that says Proved (trusted, but for its search for counterexamples)."""
from trainverify.kernel.prove import BUDGET, Proved, Refuted, Unknown, Verdict, prove
from trainverify.kernel.terms import ANY, NEGATIVE, NONNEGATIVE, NONPOSITIVE, NONZERO, POSITIVE, ZERO, Node, Obligation, Terms

__all__ = ["ANY", "BUDGET", "NEGATIVE", "NONNEGATIVE", "NONPOSITIVE", "NONZERO", "POSITIVE", "ZERO", "Node", "Obligation", "Proved", "Refuted",
           "Terms", "Unknown", "Verdict", "prove"]
