# Set-up and checks. `make verify` and `make test` need nothing but Python 3.11 or newer and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
STAMP := $(VENV)/.installed
FRAMEWORKS := $(VENV)/.frameworks
TRAINVERIFY := $(VENV)/bin/trainverify
# As many tests at a time as there are cores; one that is done takes over what waits for another.
PYTEST := $(VENV)/bin/python -m pytest -n auto --dist worksteal
# The ranks of a program under verification and the test process share few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: setup frameworks verify test test-all test-bugs test-frameworks bench bench-bugs bench-frameworks bench-mutants clean

setup: $(STAMP)

# torch comes first and alone: pip then takes the build that the machine's index offers for exactly this version (a CPU build where there is one).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test,examples]'
	touch $@

# What examples/frameworks runs; without dependencies, which would bring other builds of torch.
frameworks: $(FRAMEWORKS)

$(FRAMEWORKS): requirements/frameworks.txt $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements/frameworks.txt
	touch $@

verify: setup
	$(TRAINVERIFY) verify examples/fsdp2_tp.py

test: setup
	$(PYTEST) -m 'not slow and not corpus and not frameworks'

test-all: setup
	$(PYTEST) -m 'slow and not corpus and not frameworks'

# Every program of the bug corpus and of tests/programs, right and wrong (about an hour; each change runs a sample of them).
test-bugs: setup
	$(PYTEST) -m 'corpus or slow' tests/bugs tests/programs tests/examples

# A dozen runs of real frameworks, one after the other: each is a world of processes.
test-frameworks: setup frameworks
	$(VENV)/bin/python -m pytest -m frameworks tests/frameworks

bench: setup
	$(VENV)/bin/python bench/run.py
	$(VENV)/bin/python bench/capture_rate.py
	$(VENV)/bin/python bench/obligations.py

# What the reports on the bug corpus get right, by class, and false alarms on correct programs (an hour or two).
bench-bugs: setup
	$(VENV)/bin/python bench/bugs.py

# All runs of real frameworks; writes docs/frameworks.md (half an hour).
bench-frameworks: setup frameworks
	$(VENV)/bin/python bench/frameworks.py

# Bugs planted in programs that equal their reference: what a verification makes of each. None whose output changes may be PROVED (about an hour).
bench-mutants: setup
	$(VENV)/bin/python bench/mutants.py

clean:
	rm -rf $(VENV) .trainverify build dist src/*.egg-info
