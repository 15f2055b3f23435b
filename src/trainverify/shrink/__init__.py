"""Shape reduction: recorded programs at small sizes (trusted: what is proved of the small programs is said of the recorded ones; docs/shape-reduction.md)."""
