"""Equal pieces of the programs are proved once: values named by the operations that made them, and theorems about small groups of those."""
