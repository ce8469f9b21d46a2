# Every target makes what it needs; a fresh machine wants only Python 3.11+ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PREFIX ?= /usr/local
JOBS   ?= auto

.DEFAULT_GOAL := help
.PHONY: help run test check fmt simulate soak bench render install uninstall deb clean

help:            ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

$(VENV)/.run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "homeGPT needs Python 3.11 or newer; say make PYTHON=python3.12")'
	@echo 'making $(VENV) with what homegptd needs (once; from PyPI) …'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.run
	@echo 'adding the tools for tests and checks to $(VENV) (once; from PyPI) …'
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: $(VENV)/.run        ## the demo, no GPU, no root: make run ARGS="--models 8 --speed 1"
	@$(BIN)/homegptd demo $(ARGS)

test: $(VENV)/.dev       ## every test that needs no privileges
	$(BIN)/pytest -q -m 'not lab and not webui' -n $(JOBS) --maxprocesses 8 --dist worksteal

check: $(VENV)/.dev      ## ruff, mypy, import borders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fmt: $(VENV)/.dev        ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

simulate: $(VENV)/.dev   ## hundreds of virtual hours: make simulate SEED=7 HOURS=200
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(HOURS),--hours $(HOURS))

soak: $(VENV)/.dev       ## a real daemon in all the trouble there is: make soak MINUTES=60 SEED=7
	@$(BIN)/python -m tests.soak $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

bench: $(VENV)/.dev      ## measure: docs/performance.md says what (BENCH="switch relay" for some)
	@for name in $(or $(BENCH),switch transfer forecast cli memory start lease proxies); do \
		$(BIN)/python -m bench.$$name $(if $(JSON),--json) || exit; done

render: $(VENV)/.run     ## quadlet/ from etc/homegpt/config.yaml
	@$(BIN)/homegptctl render --config etc/homegpt/config.yaml --to quadlet

install:         ## onto this box, as root: make install PREFIX=/usr/local DESTDIR=
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' PYTHON='$(PYTHON)' VENDOR='$(VENDOR)' COMPILE='$(COMPILE)' systemd/install

uninstall:       ## off this box again; the weights are kept
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' systemd/uninstall

deb:             ## dist/homegpt_….deb for Debian 13; what its mirrors lack travels inside
	@PYTHON='$(PYTHON)' systemd/debian/build

clean:           ## remove what the targets made
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
