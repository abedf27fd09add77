# make quickstart   train the three stages of a tiny Croc on the CPU; ARGS=--long: until it looks
# make test         every test a CPU can run
# make check        what a change must pass: lint, format, types, layers, tests
# make clean        remove .venv and everything that was made

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.installed-by-make
BIN := $(VENV)/bin

# One thread per process: distributed tests start several processes on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check clean

quickstart: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/run.sh $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment that is there is used again, and brought up to date.
$(READY): setup.py constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dali,dev]' -c constraints-cpu.txt
	touch $@
