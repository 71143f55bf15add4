# `make demo` and `make test` do everything on a fresh machine that has Python 3.11 or newer, its pip, and make.
PYTHON ?= python3
DEV := .venv
RUN := .venv-run
WHEEL := .venv-wheel
LEAN := .venv-export
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
CHECK_PYTHON := command -v $(PYTHON) > /dev/null || { echo "error: expected Python 3.11 or newer, got no $(PYTHON); install it" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; v = sys.version_info; \
	v >= (3, 11) or sys.exit(f"error: expected Python 3.11 or newer, got {v[0]}.{v[1]}; run make PYTHON=python3.x")'

.PHONY: help install demo test test-fast test-gemma lint types pytest dist wheel lean clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install the runtime, then ask a real chat model (93 MB) with Dovetail and without"
	@echo "make test       install everything, then lint, types, tests, and what is built where torch is not"
	@echo "make test-fast  the runtime's tests that need no export, in about a minute"
	@echo "make test-gemma the tests with Gemma 3, which is fetched (250 MB, Gemma's licence)"
	@echo "make install    a virtual environment $(DEV) with all extras"
	@echo "make clean      remove what these made"

install: $(DEV)/installed

demo: $(RUN)/installed
	$(RUN)/bin/python artifacts/demo.py

test: lint types pytest wheel lean
	@echo "all checks passed"

lint: $(DEV)/installed
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .

types: $(DEV)/installed
	$(DEV)/bin/mypy

# Training in a process of its own: torch's backward pass crashes where other native engines were loaded before (docs/log.md).
TRAINING := tests/export/training/test_draft_training.py tests/export/training/test_target_training.py
pytest: $(DEV)/installed
	$(DEV)/bin/python -m pytest -q --durations=5 $(TRAINING)
	$(DEV)/bin/python -m pytest -q --durations=10 $(TRAINING:%=--ignore=%)

# While working on the runtime: what needs no model made by torch (tests/conftest.py sets the mark).
test-fast: $(DEV)/installed
	$(DEV)/bin/python -m pytest -q -m "not exports" --ignore=tests/runtime/batch tests/runtime tests/laws/test_architecture.py

# Gemma 3 as a GGUF file, from its packages, under Gemma's licence (https://ai.google.dev/gemma/terms).
test-gemma: $(DEV)/installed
	$(DEV)/bin/python -m pytest -q --gemma -m gemma

dist: $(DEV)/installed
	rm -rf build dist
	$(DEV)/bin/python -m build --wheel --outdir dist . > /dev/null

# The wheel as a server gets it: in an environment without torch, away from the checkout.
wheel: dist $(WHEEL)/installed
	$(WHEEL)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps dist/*.whl
	cd $(WHEEL) && bin/python ../tests/tools/wheel.py ../artifacts/pystd

# A real model, from its GGUF file to an answer, where only the extra `export` is installed.
lean: dist $(LEAN)/installed
	$(LEAN)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps dist/*.whl
	cd $(LEAN) && PYTHONPATH=../tests/support:../artifacts bin/python ../tests/tools/lean_export.py

# Environments are made once and brought up to date when what they install from has changed.
$(DEV)/installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP_INSTALL) -e '.[export,convert,train,dev]'
	@touch $@

$(RUN)/installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python $(PIP_INSTALL) -e '.[export]'
	@touch $@

$(WHEEL)/installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python $(PIP_INSTALL) .
	@touch $@

$(LEAN)/installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(LEAN)
	$(LEAN)/bin/python $(PIP_INSTALL) '.[export]'
	@touch $@

clean:
	rm -rf $(DEV) $(RUN) $(WHEEL) $(LEAN) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
