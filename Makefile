# Every target runs from .venv and builds it first where it is missing. After
# that, pip runs again only when pyproject.toml has changed.

VENV := .venv
PYTHON := $(VENV)/bin/python
# Written last of all, so a set-up that failed half-way is tried again.
READY := $(VENV)/.ready
# The first of these that runs and is new enough makes the venv.
PYTHONS ?= python3.13 python3.12 python3
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))

.DEFAULT_GOAL := help
.PHONY: help setup train demo test test-slow test-long test-tpus faults io owners soak lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s%s\n", $$1, $$2}' \
	  Makefile
	@echo 'ARGS adds arguments: make test ARGS="-k indexer"'

setup: $(READY)  ## make .venv and install everything into it

train: $(READY)  ## train configs/tiny.py, small enough for a laptop's CPU
	$(PYTHON) -m train.main --config=configs/tiny.py $(ARGS)

demo: $(READY)  ## turn a tiny dense model sparse, and print what it is worth
	$(PYTHON) -m train.lifecycle --config=configs/tiny_lifecycle.py $(ARGS)

test: $(READY)  ## run the tests, but for the slow ones
	$(PYTHON) -m pytest -n 2 --dist=loadfile -m "not (slow or long or tpus)" $(ARGS)

test-tpus: $(READY)  ## compile every kernel for every TPU, at the real shapes
	$(PYTHON) -m pytest -n 2 --dist=loadfile -m tpus $(ARGS)

SLOW := -m "slow and not long"
# pytest exits with 5 where it selects no test. Having no slow test is fine;
# having none at all is not, so only this target accepts it.
test-slow: $(READY)  ## run the slow tests
	@echo '$(PYTHON) -m pytest -n 2 --dist=loadfile $(SLOW) $(ARGS)'; \
	$(PYTHON) -m pytest -n 2 --dist=loadfile $(SLOW) $(ARGS) || { \
	  status=$$?; \
	  test $$status -eq 5 || exit $$status; \
	  echo 'No slow test was selected.'; \
	}

test-long: $(READY)  ## run the tests that do not fit into CI's hour
	$(PYTHON) -m pytest -n 2 --dist=loadfile -m long $(ARGS)

faults: $(READY)  ## kill runs at random moments; they must come out the same
	$(PYTHON) -m tests.faults.kills $(ARGS)

io: $(READY)  ## make system calls of short runs fail; they must come out the same
	$(PYTHON) -m tests.faults.io $(ARGS)

owners: $(READY)  ## start two programs on one run; one of them must train
	$(PYTHON) -m tests.faults.owners $(ARGS)

soak: $(READY)  ## keep a run alive for half an hour, a fault a minute
	$(PYTHON) -m tests.faults.soak $(ARGS)

lint: $(READY)  ## check format, lint and types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyrefly check

format: $(READY)  ## rewrite the code as `make lint` wants it
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
	find . -path ./.git -prune -o -path ./runs -prune -o \
	  -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate must run, not only exist: version managers put commands on the
# PATH that only print an error.
$(READY): pyproject.toml
	@if ! $(PYTHON) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
	  found=; \
	  for python in $(PYTHONS); do \
	    if $$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'dsa_jax needs Python 3.12 or newer; none of these is one:' \
	      '$(PYTHONS).' >&2; \
	    echo 'Install one, or name yours: make setup PYTHONS=/path/to/python' \
	      >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$found ($$($$found --version))."; \
	  $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@echo 'Installing dsa_jax and what it needs into $(VENV):' \
	  'a minute or two, this once.'
	@$(PYTHON) -m pip install -qq --disable-pip-version-check \
	  --editable '.[dev]'
	@touch $@
