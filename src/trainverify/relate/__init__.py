"""How the parallel program's values correspond to the reference's: symbols, bindings, comparison. Untrusted guesses only where said."""
