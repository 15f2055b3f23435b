"""The trace data model: what one rank executed, in order. No torch here."""
