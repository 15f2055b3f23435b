"""Execute a captured program again: bit for bit with torch's kernels, and in any number of algebras, all ranks in lock step."""
