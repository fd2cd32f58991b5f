# Everything that a clone needs: `make demo`, `make test`, `make check`, `make bench`.
# A Debian machine with git, make and python3-venv is enough.
PYTHON ?= python3
VENV := .venv
MADE := $(VENV)/made
# MADE is written last: an environment without it is incomplete.
RUN := $(VENV)/bin/python
PYTEST ?= $(RUN) -m pytest
# Workers take whole groups; tests/conftest.py sets their number. `make test PARALLEL=` runs in one process.
PARALLEL ?= -n auto --dist loadscope --no-loadscope-reorder

export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check bench mutants clean $(VENV)

help:
	@echo "make demo    train, evaluate and merge small models on two cores: runs/demo/report.html"
	@echo "make test    the test suite"
	@echo "make check   lint, format, types, imports, pages"
	@echo "make bench   benchmarks beside peers"
	@echo "make mutants are slips in the core modules noticed by the tests? ARGS=--help"

demo: $(VENV)
	$(RUN) -m launch.demo

test: $(VENV)
	$(PYTEST) $(PARALLEL) $(ARGS)

check: $(VENV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(PYTEST) -q tests/test_imports.py tests/test_layout.py tests/test_docs.py

# The first run measures which test runs which line: it takes as long as the suite, some minutes more.
mutants: $(VENV)
	$(RUN) -m tests.mutants $(ARGS)

bench: $(VENV)
	$(RUN) -m benchmarks $(ARGS)

$(VENV): $(MADE)

# A complete environment is updated in place; an incomplete one is created again.
$(MADE): pyproject.toml constraints.txt $(wildcard data_pipeline/transforms/*.c pretrain/merge/methods/csrc/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, this is $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@if [ -e $(MADE) ]; then rm $(MADE); else $(PYTHON) -m venv --clear $(VENV); fi
	$(RUN) -m pip install --quiet -c constraints.txt uv
	$(RUN) -m uv pip install --quiet --compile-bytecode --python $(RUN) -c constraints.txt -e '.[all,dev]'
	@touch $(MADE)

clean:
	rm -rf $(VENV) .mutants build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
