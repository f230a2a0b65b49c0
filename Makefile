# make train [ARGS="..."]   install into .venv on the first call, then python train.py $(ARGS)
# make test                 lint, format check, types, tests
# make size                 how long the files and functions are
PYTHON ?= python3
VENV ?= .venv
# Torch's newest release may pull several GB of CUDA libraries; any build in the range of pyproject.toml will do.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib qat || true

.PHONY: train test size
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright qat & types=$$!; $(BIN)/python -m pytest -n auto --dist worksteal && wait $$types

size:
	@$(PYTHON) benchmarks/size.py

# --no-compile: pip compiles with one process what compileall does with all, a minute of 26,000 files. Some of these are
# templates, which is no error.
# The stamps make a second call reuse the environment until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile "$(TORCH)"
	$(PIP) install --no-compile -e .
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile "$(TORCH)" -e ".[dev]"
	$(COMPILE)
	touch $(VENV)/.installed $@
