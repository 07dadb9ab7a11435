# The verbs of the project. Each makes .venv by itself when it is missing or out of date;
# PYTHON=/path/to/python chooses the interpreter of a new one.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

bin := .venv/bin
core := .venv/.hilbertcell-dev
with_docs := .venv/.hilbertcell-docs

.PHONY: help venv demo test test-slow lint types docs bench bench-streaming constraints

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

$(core): pyproject.toml constraints.txt scripts/make_venv.sh
	scripts/make_venv.sh .venv dev
	@touch $@

$(with_docs): $(core)
	scripts/make_venv.sh .venv dev,docs
	@touch $@

venv: $(core) ## make .venv with hilbertcell and the developer's tools in it

demo: $(core) ## from simulated donors to a report in demo/
	$(bin)/hilbertcell demo --out demo --force

test: $(core) ## the quick tests
	$(bin)/pytest -q -m "not slow"

test-slow: $(core) ## the statistical tests and benchmarks that take minutes
	$(bin)/pytest -q -m slow

lint: $(core) ## style and layout of the source
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(core) ## static types
	$(bin)/python scripts/link_types.py
	$(bin)/mypy -p hilbertcell | sed "s,^.types/hilbertcell/,,"

docs: $(with_docs) ## the pages of docs/ as a site in docs/_build/html
	$(bin)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(core) ## the figures of docs/benchmarks.md (hours; needs the real data)
	$(bin)/python -m hilbertcell.analyses.first_benchmarks
	$(bin)/python -m hilbertcell.analyses.transport_benchmark
	$(bin)/python -m hilbertcell.analyses.simulated_benchmark
	$(bin)/python -m hilbertcell.analyses.calibration_benchmark
	$(bin)/python -m hilbertcell.analyses.size_benchmark
	$(bin)/hilbertcell benchmark --config analyses/benchmarks/shared.toml --out .benchmark
	$(bin)/python -m hilbertcell.analyses.benchmark_page --grid .benchmark

bench-streaming: $(core) ## streaming a million simulated cells against merely reading them (half an hour, 2 GB of disk)
	$(bin)/python -m hilbertcell.analyses.streaming_benchmark
	$(bin)/python -m hilbertcell.analyses.benchmark_page

constraints: ## resolve constraints.txt afresh (needs uv)
	uv pip compile pyproject.toml --extra dev --extra docs --upgrade --quiet --no-header --no-annotate \
	  --python-version 3.12 --python-platform x86_64-unknown-linux-gnu --output-file constraints.txt
