"""What outlives a run: obligations as SMT-LIB, second opinions of other provers, dumps of what is not proved, certificates.

Not trusted: nothing here says Proved.
"""
