# make demo      the whole story, one report         make test         everything that must hold
# make check     lint, types, import contracts       make bench        side by side with the peers
# make notebook  the five chapters in JupyterLab     make docker-test  build the images, run them
.DEFAULT_GOAL := help
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUN    := $(VENV)/bin

# A folder of data sets beside the checkout is used where it is; otherwise the cache, then a download.
ifeq ($(origin SPARRING_DATA),undefined)
  ifneq ($(wildcard ../shared/data),)
    export SPARRING_DATA := $(abspath ../shared/data)
  endif
endif

help: ; @sed -n '1,3s/^# //p' Makefile

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@
$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) torch --editable .
	@touch $@
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test]'
	@touch $@
$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[test,bench]'
	$(PIP) --no-deps torchattacks==3.5.1   # its dependencies drag in torchvision
	@touch $@

$(VENV)/.notebook: $(VENV)/.demo
	$(PIP) --editable '.[notebook]'
	@mkdir -p $(VENV)/share/jupyter/lab/settings  # a double click opens a chapter, a .py file, as a notebook
	@cp docker/lab-overrides.json $(VENV)/share/jupyter/lab/settings/overrides.json
	@touch $@

demo: $(VENV)/.demo
	$(RUN)/sparring demo $(ARGS)

check: $(VENV)/.test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: check
	$(RUN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

bench: $(VENV)/.bench
	$(RUN)/python benchmarks/overhead.py

notebook: $(VENV)/.notebook
	$(RUN)/jupyter lab --notebook-dir notebooks $(ARGS)

docker-test:
	docker/test.sh

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help demo check test bench notebook docker-test clean
