# make demo | test | check | bench | screenshots: each sets up .venv by itself. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo check test test-all screenshots bench clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts --editable '.[dev]' 2>&1 | grep -vE '^WARNING: (Location|Cache)' || true
	@$(BIN)/python -c 'import torch, ray, deepspeed, mlflow, engine' 2>/dev/null || { echo 'the installation failed: $(BIN)/pip install -e ".[dev]" says why'; exit 1; }
	@touch $@

demo: install
	@$(BIN)/manta demo $(if $(KEEP),demo.keep=true) $(ARGS)

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Two at a time: one process waits for Ray while the other computes.
PARALLEL := -n $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

test: check
	@$(BIN)/pytest -m "not slow" $(PARALLEL)

test-all: check
	@$(BIN)/pytest $(PARALLEL)

# The pictures of the README: the tests of the pages write them.
screenshots: install
	@MANTA_SCREENSHOTS=$(CURDIR)/.github/screenshots $(BIN)/pytest -k 'screenshot or page_streams'

# What only a peer needs lies apart: transformers imports accelerate wherever it finds it, which costs each of our ranks a second.
.venv/peers: .venv/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ 'accelerate>=1.10'

bench: install .venv/peers
	@for bench in step attention startup hf_trainer tokenize resume_order checkpoint_stall restart generation decoding serving classify sweep; do echo "== $$bench"; $(BIN)/python -m tests.bench.$$bench || exit 1; done

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
