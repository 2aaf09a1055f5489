# make demo, make test, make test-lowest: each sets up all it needs; only Python 3.10+ and pip have to be there.

PYTHON ?= python3
VENV ?= .venv
# The CPU build where the package index has one. For a GPU: make demo TORCH="torch==2.13.0 --index-url <a CUDA index>"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-lowest lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What depends on transformers most, with the lowest versions that pyproject.toml allows (but for torch and the extras).
# README's table is left out: which attentions stock has depends on the version, and the newest is described.
test-lowest:
	$(MAKE) VENV=.venv-lowest .venv-lowest/.lowest
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -k "not compiled and not table_in_the_readme" \
		tests/modeling/test_architectures.py tests/modeling/test_architectures_loading.py \
		tests/modeling/test_golden_sweet.py tests/training/test_trainer.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A stamp is written when everything before it succeeded: an interrupted set-up is taken up again by the next call.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@

$(VENV)/.lowest: $(VENV)/.torch pyproject.toml
	grep -oE '"[a-z0-9-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -vE '^(torch|setuptools)=' \
		> $(VENV)/lowest.txt
	$(PIP_INSTALL) --editable . hypothesis pytest pytest-xdist --constraint $(VENV)/lowest.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .cache outputs
