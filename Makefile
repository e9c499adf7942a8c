# Needs Python (3.11 or later, with venv and pip) and make; everything else is installed in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tests run in this many processes: a number, or `logical` for one per CPU.
WORKERS ?= logical
# Given to the command that a target runs: make test ARGS="-k jacobian", make demo ARGS=--quick
ARGS ?=

DEVICELESS_VENV := .venv-deviceless
OLDEST_VENV := .venv-oldest
OLDEST_PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo $(PYTHON))
# The lowest that the lowest jax accepts on Python 3.11 and 3.12.
OLDEST_NUMPY := numpy==1.26.0 scipy==1.11.2
NEWEST_VENV := .venv-newest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all test-oldest test-newest fuzz lint format bench bench-deviceless docs build clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	while IFS='|' read -r target text; do printf '  make %-16s %s\n' "$$target" "$$text"; done

demo: $(VENV)/.installed-demo ## verify the derivatives and measure them on this machine
	$(BIN)/python -m jaxsoft $(ARGS)

TESTS := -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
UNIT_TESTS := $(TESTS) -m "not notebook and not example and not peer and not docs and not release"
PYTEST := $(BIN)/python $(TESTS)
QUICK := $(PYTEST) --jaxtyping-packages= --keep-programs

# The status of pytest where ARGS select no test.
NONE := [ $$? -eq 5 ]

# Two parts: what needs no optimised programs, and the rest. The annotations are checked by test-all.
# What XLA has compiled once is kept, so that the next run compiles what has changed.
test: $(VENV)/.installed-test ## run what a contributor needs: all but what is marked as slow
	$(QUICK) --unoptimised -m "not slow and not optimised" $(ARGS) || $(NONE)
	$(QUICK) -m "optimised and not slow" $(ARGS) || $(NONE)

test-all: $(VENV)/.installed-test ## run everything, with notebooks, examples, suites of peers
	$(PYTEST) $(ARGS)

test-oldest: $(OLDEST_VENV)/.installed ## run the unit tests with the lowest supported jax
	$(OLDEST_VENV)/bin/python $(UNIT_TESTS) $(ARGS)

test-newest: $(NEWEST_VENV)/.installed ## run the unit tests with the newest jax: make PYTHON=python3.13 test-newest
	$(NEWEST_VENV)/bin/python $(UNIT_TESTS) $(ARGS)

fuzz: $(VENV)/.installed-test ## run 100,000 random cases
	$(BIN)/python -m pytest tests/functions/test_fuzz.py --hypothesis-profile=fuzz $(ARGS)

lint: $(VENV)/.installed-lint ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint ## sort the imports, mend what can be mended, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench ## measure accuracy, speed and memory; write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks $(ARGS)

bench-deviceless: $(DEVICELESS_VENV)/.installed ## count what an H100 would run, without one
	$(DEVICELESS_VENV)/bin/python -m benchmarks.deviceless $(ARGS)

docs: $(VENV)/.installed-docs ## build the pages of docs/ into docs/_build/html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q $(ARGS) docs docs/_build/html

build: $(VENV)/.installed-release ## make the wheel and the source distribution in dist, and check them
	rm -rf dist
	$(BIN)/python -m build $(ARGS)
	$(BIN)/python -m twine check --strict dist/*

# Python 3.11 is too old for it.
$(NEWEST_VENV)/.installed: pyproject.toml jaxsoft/__init__.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 12))" || \
		{ echo "the newest jax needs Python 3.12 or later: make PYTHON=python3.13 test-newest"; exit 1; }
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade --editable ".[demo,unit]"
	@touch $@

clean: ## remove the environments, the caches and what was built
	rm -rf $(VENV) $(DEVICELESS_VENV) $(OLDEST_VENV) $(NEWEST_VENV) build dist
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: they share the environment, in any order, and a second run installs
# nothing unless pyproject.toml, or the file that holds the version, has changed.
$(VENV)/.installed-%: pyproject.toml jaxsoft/__init__.py $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "jaxsoft needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# An environment of its own, for with these compilers installed JAX looks for their devices.
$(DEVICELESS_VENV)/.installed: pyproject.toml jaxsoft/__init__.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "jaxsoft needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(DEVICELESS_VENV)
	$(DEVICELESS_VENV)/bin/python -m pip install --quiet --editable ".[deviceless]"
	@touch $@

# The lower bounds of pyproject.toml, taken as exact versions.
$(OLDEST_VENV)/.installed: pyproject.toml jaxsoft/__init__.py Makefile
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --editable ".[demo,unit]" $(OLDEST_NUMPY) \
		$$($(OLDEST_VENV)/bin/python -c 'import tomllib; \
		print(*(d.replace(">=", "==") for d in \
		tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))')
	@touch $@
