"""What can go wrong while replaying: our own faults, never a verdict."""


class ReplayError(Exception):
    """The trace cannot be replayed faithfully."""
