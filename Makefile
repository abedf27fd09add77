# make quickstart   train the three stages of a tiny Croc on the CPU; ARGS=--long: until it looks
# make test         every test a CPU can run
# make lint         lint, format, types, layers
# make wheel        build the wheel, install it in an empty folder and run its commands
# make check        lint, test, wheel, and whether the pinned versions agree: what a change must pass
# make libraries    tests against the real Python of Transformer Engine and flash-attn (10 MB from PyPI)
# make ecosystem    exports in transformers 4.57 and 5, peft and vLLM (CPU; 3 GB, more where PyTorch's index is out of reach)
# make mutations    plant one-line faults in a copy, list those no test sees; ARGS="--sample 60"
# make docs         the pages of docs/ as a site in build/site; a broken link is an error
# make clean        remove .venv and everything that was made

# The first of them that starts: a name on PATH may be a shim of a version that is not installed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '' 2>/dev/null && command -v $$p && break; done)
# For Linux, PyPI only has torch with CUDA (about 2.5 GB with what it needs). PyTorch's own index has
# a CPU build (about 200 MB); where it cannot be reached, pip takes PyPI's.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
READY := $(VENV)/.installed-by-make
BIN := $(VENV)/bin
DOCS := build/docs-venv

# One thread per process: distributed tests start several processes on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint wheel check libraries ecosystem mutations docs clean

quickstart: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/run.sh $(ARGS)

# -rs: the summary lists every skipped test with its reason.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

wheel: $(READY)
	$(BIN)/python -m pytest -m slow tests/functional/test_wheel.py

check: lint test wheel
	$(BIN)/python -m pytest -m slow tests/functional/test_installation.py

libraries: $(READY)
	PYTHON=$(BIN)/python tests/support/fetch_libraries.sh
	$(BIN)/python -m pytest -m libraries tests/libraries

ecosystem: $(READY)
	PYTHON=$(PYTHON) tests/support/make_ecosystem.sh build/ecosystem
	$(BIN)/python -m pytest -m ecosystem tests/ecosystem

mutations: $(READY)
	$(BIN)/python -W ignore tests/mutation/run.py $(ARGS)

# A separate environment: the pages need neither torch nor megatron-core.
docs: $(DOCS)/bin/mkdocs
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/bin/mkdocs: constraints-cpu.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -c constraints-cpu.txt mkdocs
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An existing virtual environment is updated.
$(READY): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) \
		-c constraints-cpu.txt torch
	$(BIN)/python -m pip install -e '.[dali,dev]' -c constraints-cpu.txt
	touch $@
