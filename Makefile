# make demo, make test, make test-lowest, make test-onnx, make test-second: each sets up all it needs; only Python 3.10+
# and pip have to be there.

PYTHON ?= python3
VENV ?= .venv
# The CPU build where the package index has one. For a GPU: make demo TORCH="torch==2.13.0 --index-url <a CUDA index>"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SECOND_PYTHON ?= $(shell .ci/second-python)
ONNX_TESTS := tests/deployment tests/modeling/test_export.py tests/calibration/test_reference.py \
	tests/serving/test_engine.py tests/test_malformed_arguments.py tests/test_compare_deployments.py tests/test_documents.py
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-lowest test-onnx test-second lint package clean

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30

# What depends on transformers most, with the lowest versions that pyproject.toml allows (but for torch and the extras).
# Warnings are no errors here: old versions have some of their own. README's table is left out: which attentions stock has
# depends on the version, and the newest is described.
test-lowest:
	$(MAKE) VENV=.venv-lowest .venv-lowest/.lowest
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -W default -k "not compiled and not table_in_the_readme" \
		tests/modeling/test_architectures.py tests/modeling/test_architectures_loading.py \
		tests/modeling/test_golden_sweet.py tests/training/test_trainer.py

# What is exported; in `make test` these are left out where onnx is not installed.
test-onnx: $(VENV)/.onnx
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ONNX_TESTS) \
		-k "deployment or onnx or exported_classifier or exported_model or code_of_the_readme"

# Exported classifiers, which need no torch, on another Python; and no file of ours is one that it cannot read.
test-second: $(VENV)/.onnx
	@if [ -z "$(SECOND_PYTHON)" ]; then echo "no Python but 3.11 here: give one as SECOND_PYTHON=..."; \
	else $(MAKE) .venv-second/.runtime && .venv-second/bin/python -W error -m compileall -qf src examples tests && \
		SECOND_PYTHON=$(CURDIR)/.venv-second/bin/python \
		$(BIN)/python -m pytest -k without_torch tests/deployment/test_onnx_export.py; fi

# Wheel and sdist as a stranger installs them.
package: $(VENV)/.dev
	.ci/package

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

$(VENV)/.onnx: $(VENV)/.dev
	$(PIP_INSTALL) --editable ".[dev,onnx]"
	touch $@

.venv-second/.runtime: pyproject.toml
	$(SECOND_PYTHON) -m venv .venv-second
	.venv-second/bin/python -m pip install --quiet numpy onnxruntime tokenizers
	touch $@

$(VENV)/.lowest: $(VENV)/.torch pyproject.toml
	grep -oE '"[a-z0-9-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -vE '^(torch|setuptools)=' \
		> $(VENV)/lowest.txt
	$(PIP_INSTALL) --editable . hypothesis pytest pytest-xdist --constraint $(VENV)/lowest.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-second .cache outputs
