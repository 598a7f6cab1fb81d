# Needs make and a Python of 3.11 to 3.14; everything else is installed into .venv, .venv-oldest and
# .venv-accelerators.

# Interpreters that really run (a version manager's shim may be on the PATH and fail), oldest first.
PYTHONS := $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 \
        $(HOME)/.pyenv/versions/3.1[1-4]*/bin/python; do "$$p" -c 'import ensurepip, sys; \
        (3, 11) <= sys.version_info[:2] <= (3, 14) and print(sys.version_info[1], sys.executable)'; \
        done 2>/dev/null | sort -n -u -k1,1 | cut -d" " -f2)
PYTHON ?= $(lastword $(PYTHONS))
OLDEST_PYTHON ?= $(firstword $(PYTHONS))
# The pins of the trainers were tried on Python 3.12 only.
INTEGRATIONS_PYTHON ?= $(firstword $(shell for p in $(PYTHONS); do "$$p" -c 'import sys; \
        sys.version_info[:2] == (3, 12) and print(sys.executable)'; done))

# pyproject.toml's lower bounds, as exact versions.
OLDEST = $(shell sed -n '/^dependencies/,/^]/s/.*"\(.*\)>=\(.*\)".*/\1==\2/p' pyproject.toml)
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --upgrade
PYTEST = -m pytest -n 2 --dist worksteal -q
QUICK = not slow and not thorough

# Without LLVM's optimisations programs compile faster; what they send and compute is the same.
UNOPTIMISED = XLA_FLAGS=--xla_backend_optimization_level=0
unexport PYTHONDONTWRITEBYTECODE  # pytest rewrites every module again where it cannot be stored

.PHONY: help demo docs integrations notebooks test test-all test-rest lint test-shapes test-thorough test-slow test-docs \
	test-oldest test-accelerators mutants clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile
	@echo "PYTHON=$(PYTHON) OLDEST_PYTHON=$(OLDEST_PYTHON)"

demo: .venv/examples  ## train on eight simulated workers, averaged and voted, and compare
	.venv/bin/python examples/train_digits.py

notebooks: .venv/notebooks  ## run the notebooks' paired text, and write them with what it gives
	cd notebooks && ../.venv/bin/jupytext --quiet --to ipynb --execute [0-9]*.py
	.venv/bin/python notebooks/lead_figures.py

docs: .venv/docs  ## build the documentation, docs/_build/html/index.html
	.venv/bin/python -m sphinx --quiet --fresh-env --write-all --fail-on-warning docs docs/_build/html

test: lint  ## lint, types and the tests that matter most, at the newest jax: 7 minutes on two cores
	$(UNOPTIMISED) .venv/bin/python $(PYTEST) -m "$(QUICK)"

test-all: test test-rest  ## run everything: half an hour on two cores

# The compilers for accelerators leave half of a core idle.
test-rest: test-shapes test-thorough test-slow test-docs  ## run what `make test` leaves out
	$(MAKE) --jobs 2 --output-sync=target test-oldest test-accelerators

lint: .venv/test  ## lint, check the format, the direction of imports, and the types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports --no-logo
	.venv/bin/pyright --pythonpath .venv/bin/python

# The annotations of the wire, `UInt32[Array, "M n"]`, checked in every call but those that should fail.
test-shapes: .venv/test
	$(UNOPTIMISED) .venv/bin/python $(PYTEST) -m "$(QUICK)" -k "not rejects" \
		--jaxtyping-packages=signax._wire,beartype.beartype tests/test_words.py tests/test_packing.py \
		tests/test_exchange.py tests/test_quantized.py tests/test_means.py

test-thorough: .venv/test
	$(UNOPTIMISED) .venv/bin/python $(PYTEST) -m thorough

# One after the other in conftest.py's order, the longest first. Many wait for processes: three fill two cores.
test-slow: .venv/test
	.venv/bin/python -m pytest -n 3 --dist load --maxschedchunk 1 -q -m slow

test-docs: docs .venv/test  ## open every page of the documentation in Chromium
	SIGNAX_SITE=docs/_build/html .venv/bin/python -m pytest -n 2 -q tests/test_site.py

# Benchmarks, which are for developers, run at the newest jax.
test-oldest: .venv-oldest/test
	$(UNOPTIMISED) .venv-oldest/bin/python $(PYTEST) -m "$(QUICK)" \
		--ignore=tests/test_benchmarks.py --ignore=tests/test_elastic_faults.py

test-accelerators: .venv-accelerators/accelerators  ## compile for TPU pods and GPUs, and read the programs
	JAX_PLATFORMS=cpu SIGNAX_ACCELERATORS=1 .venv-accelerators/bin/python -m pytest -q \
		tests/test_accelerators.py

integrations: .venv-integrations/integrations  ## run the recipes for MaxText, Tunix and Flax
	.venv-integrations/bin/python examples/integrations/run.py

mutants: .venv/test  ## break the library on purpose, and see whether `make test` notices
	$(UNOPTIMISED) .venv/bin/python tests/mutants.py

clean:  ## remove the environments and every cache
	rm -rf .venv .venv-oldest .venv-accelerators .venv-integrations docs/_build docs/notebooks
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find signax tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# A stamp says that its environment holds what pyproject.toml asks for.
.venv/docs .venv/examples .venv/notebooks .venv/test: .venv/%: .venv/pyvenv.cfg pyproject.toml
	.venv/bin/python $(PIP_INSTALL) jax jaxlib --editable ".[$*]"
	@touch $@

.venv-oldest/test: .venv-oldest/pyvenv.cfg pyproject.toml
	.venv-oldest/bin/python $(PIP_INSTALL) $(OLDEST) --editable ".[test]"
	@touch $@

.venv-accelerators/accelerators: .venv-accelerators/pyvenv.cfg pyproject.toml
	.venv-accelerators/bin/python $(PIP_INSTALL) --editable ".[accelerators]"
	@touch $@

.venv-integrations/integrations: .venv-integrations/pyvenv.cfg pyproject.toml \
		examples/integrations/requirements.txt
	.venv-integrations/bin/python $(PIP_INSTALL) --editable . \
		--requirement examples/integrations/requirements.txt
	@touch $@

.venv/pyvenv.cfg .venv-accelerators/pyvenv.cfg: INTERPRETER = $(PYTHON)
.venv-integrations/pyvenv.cfg: INTERPRETER = $(INTEGRATIONS_PYTHON)
.venv-oldest/pyvenv.cfg: INTERPRETER = $(OLDEST_PYTHON)
%/pyvenv.cfg:
	$(if $(INTERPRETER),,$(error no Python of 3.11 to 3.14 runs here: make PYTHON=/path/to/python))
	$(INTERPRETER) -m venv $*
