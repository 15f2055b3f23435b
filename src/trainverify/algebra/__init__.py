"""Number domains in which the op table is evaluated: real, field, terms."""
