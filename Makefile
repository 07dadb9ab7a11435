# The verbs of the project. Each makes .venv by itself when it is missing or out of date;
# PYTHON=/path/to/python chooses the interpreter of a new one.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

bin := .venv/bin
core := .venv/.hilbertcell-dev
with_docs := .venv/.hilbertcell-docs
with_torch := .venv/.hilbertcell-torch
with_browser := .venv/.hilbertcell-browser

.PHONY: help venv torch browser demo test test-slow lint types docs bench bench-quick bench-neural bench-laws bench-streaming bench-twin constraints

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

$(core): pyproject.toml constraints.txt scripts/make_venv.sh
	scripts/make_venv.sh .venv dev
	@touch $@

$(with_docs): $(core)
	scripts/make_venv.sh .venv dev,docs
	@touch $@

$(with_torch): $(core)
	scripts/make_venv.sh .venv dev,torch,torch-dev
	@touch $@

$(with_browser): $(core)
	scripts/make_venv.sh .venv dev,browser
	@touch $@

venv: $(core) ## make .venv with hilbertcell and the developer's tools in it

torch: $(with_torch) ## PyTorch in .venv as well (3 GB), for the programs in Pyro and checkpoints made with torch

browser: $(with_browser) ## Playwright in .venv and a Chromium, for the tests of pages in a browser
	scripts/find_chromium.sh

demo: $(core) ## from simulated donors to a report in demo/
	$(bin)/hilbertcell demo --out demo --force

test: $(core) ## the quick tests
	$(bin)/pytest -q -n auto --dist loadfile -m "not slow"

test-slow: $(core) ## the statistical tests and benchmarks that take minutes
	$(bin)/pytest -q -n auto --dist loadfile -m slow

lint: $(core) ## style and layout of the source
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(core) ## static types
	$(bin)/python scripts/link_types.py
	$(bin)/mypy -p hilbertcell | sed "s,^.types/hilbertcell/,,"

docs: $(with_docs) ## the site in docs/_build/html, its notebooks executed (minutes)
	$(bin)/sphinx-build -q -E -W --keep-going -j 2 -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(core) ## all figures of docs/benchmarks.md (about an hour; needs the real data)
	$(bin)/python -m hilbertcell.analyses.all_benchmarks

bench-quick: $(core) ## two screens, few models and steps: every path of the benchmark in minutes (needs the real data)
	$(bin)/hilbertcell benchmark --config analyses/benchmarks/quick.toml --out .benchmark/quick

bench-neural: $(core) ## PerturbDiff beside the baselines (about an hour; needs the real data)
	$(bin)/hilbertcell benchmark --config analyses/benchmarks/neural.toml --out .benchmark/neural

bench-laws: $(core) ## the Gaussian and the diffusion law on three screens and one simulated world (minutes; needs the real data)
	$(bin)/hilbertcell benchmark --config analyses/benchmarks/laws.toml --out .benchmark/laws
	$(bin)/python -m hilbertcell.analyses.simulated_benchmark --only unseen_batch --seeds 1 --diffusion --out .benchmark/laws

bench-streaming: $(core) ## streaming a million simulated cells against merely reading them (ten minutes, 2 GB of disk)
	$(bin)/python -m hilbertcell.analyses.streaming_benchmark
	$(bin)/python -m hilbertcell.analyses.benchmark_page

bench-twin: $(with_torch) ## one fit in NumPyro and in Pyro (minutes; needs the real data)
	$(bin)/python -m hilbertcell.analyses.twin_benchmark
	$(bin)/python -m hilbertcell.analyses.benchmark_page

constraints: ## resolve constraints.txt afresh (needs uv)
	uv pip compile pyproject.toml --extra dev --extra docs --extra torch --extra torch-dev --extra browser --upgrade --quiet --no-header --no-annotate \
	  --python-version 3.12 --python-platform x86_64-unknown-linux-gnu --output-file constraints.txt
