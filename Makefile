# Every target prepares what it needs: a virtual environment in .venv with the tested versions.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
READY_DEMO := $(VENV)/.installed-demo
READY := $(VENV)/.installed
READY_ALL := $(VENV)/.installed-all
READY_CURATE := .venv-curate/.installed
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile \
	--disable-pip-version-check --constraint=constraints.txt
# A worker per core; the tests of a file share what they train, so they stay together, in the order
# of tests/conftest.py.
PYTEST = $(VENV)/bin/python -m pytest -q --numprocesses=auto --maxprocesses=8 --dist=loadfile \
	--no-loadscope-reorder

# A machine that forbids bytecode compiles every module again in each of the many commands that the
# tests start: ten seconds of imports instead of four.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all plans lint docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train InternVL through its stages on the embedded data (runs/demo)"
	@echo "make test      the tests"
	@echo "make test-all  the tests, slow ones included: PyTorch, the TPU compiler, chromium"
	@echo "make plans     ask the TPU compiler about every stage again (plans/; hours)"
	@echo "make lint      style checks"
	@echo "make docs      the documentation as a web site (build/docs)"
	@echo "make clean     remove the virtual environment and build outputs; keeps runs/"

# For the C allocator (x86 Linux): huge pages, and freed memory kept for the next step. A training
# step on a CPU takes about a third less time.
demo: export GLIBC_TUNABLES = \
	glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=10000000000:glibc.malloc.trim_threshold=100000000000
demo: $(READY_DEMO)
	$(VENV)/bin/internvl-jax demo --workdir=runs/demo

test: $(READY)
	$(PYTEST)

test-all: $(READY_ALL) $(READY_CURATE)
	$(PYTEST) -m "slow or not slow" --durations=25 --durations-min=10

plans: $(READY_ALL)
	$(VENV)/bin/python scripts/make_plans.py

lint: $(READY)
	$(VENV)/bin/ruff check .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "open build/docs/index.html"

$(READY_DEMO): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or newer on the PATH" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[report]"
	@touch $@

$(READY): $(READY_DEMO)
	$(INSTALL) --editable ".[dev]"
	@# The web page's gradio asks for an older Pillow than the recorded images are of; see setup.py.
	$(INSTALL) --no-deps gradio
	@touch $@

# The slow tests compare with PyTorch and transformers, and ask the TPU compiler.
$(READY_ALL): $(READY)
	$(INSTALL) --editable ".[dev,torch,plan]"
	@# The evaluators that adapters serve, and what their interfaces import; not all they ask for.
	$(INSTALL) --no-deps clip-benchmark lmms-eval loguru pytz
	@touch $@

# Apache Beam caps packages below constraints.txt: its pipelines are tested in an environment apart.
$(READY_CURATE): constraints-curate.txt
	$(PYTHON) -m venv .venv-curate
	.venv-curate/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
		--only-binary=apache-beam --requirement=constraints-curate.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-curate build dist *.egg-info
