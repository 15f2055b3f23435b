"""Work in a process beside this one."""
import subprocess
import sys

FORKED = """
import torch
from trainverify.engine.beside import Beside

torch.set_num_threads(2)
torch.ones(1 << 20).exp()                     # its threads are here now

def work(told, progress):
    return told() + float(torch.ones(1 << 20).sum())

print(Beside(work).answer(1.0, lambda *a: None))
"""


def test_a_process_whose_parent_has_threads_answers():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(1.0 + (1 << 20))], done.stderr
