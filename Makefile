# Two commands are enough: `make demo` and `make test`. Everything lives in .venv, .models and out; none is in git.
SHELL := bash
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)
LOCK := requirements/cpu-py$(VERSION).txt
# The stamp is named after what .venv is made from: a second run rebuilds nothing, a new lock rebuilds all.
STAMP := .venv/.ready-$(shell cat $(LOCK) pyproject.toml requirements/setup.sh 2>/dev/null | sha256sum | cut -c1-16)
BIN := .venv/bin

# What needs neither vLLM nor Triton runs in the small .venv that `make dev` makes, too.
READY := $(if $(wildcard .venv/.dev),.venv/.dev,$(STAMP))

.PHONY: help demo test test-fast test-agent test-engine test-slow check dev bench soak gpu docs lock clean

help: ## these lines
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

# Only CPUs without AVX512 heed it (docs/adr/0002-packed-linear-weights.md); there prompts take an eighth of the time.
demo bench: export TRITON_SWAP_FLOAT32_PROMPTS = 1

demo: $(STAMP) ## real Triton, vLLM and swap agent on a simulated device: TTFT cold, swapped, warm (7 minutes)
	@$(BIN)/python -m loadtest.demo

test: $(STAMP) ## the suite: unit, agent, engine, e2e (15 minutes)
	@$(BIN)/python -m loadtest.models
	@bash .ci/tiers unit agent engine e2e

test-fast: check ## what to run before every commit: check and the unit tests (a minute)
	@$(BIN)/python -m pytest -q tests/unit -n 2

test-agent: $(READY) ## the agent against scripted engines: no Triton, no vLLM (4 minutes)
	@$(BIN)/python -m pytest -q tests/agent -n 2 --dist worksteal

test-engine: $(STAMP) ## real vLLM engines against a small agent (5 minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/engine -n 2 --dist loadfile

test-slow: $(STAMP) ## what guards a resolved issue and is too slow for `make test` (at most 30 minutes)
	@$(BIN)/python -m loadtest.models
	@bash .ci/tiers slow

check: $(READY) ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(STAMP) ## speed, as JSON, tables and a plot under out/ (three quarters of an hour)
	@$(BIN)/python -m loadtest.bench

soak: $(STAMP) ## endurance, by hand: 10,000 swap cycles, half an hour of mixed load; fails on the first lost request
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests -m soak
	@$(BIN)/python -m loadtest.load --duration 30m --out out/soak.json

gpu: ## what only an NVIDIA GPU can show, with the python3 that has vLLM: make gpu PYTHON=… (15 minutes)
	@$(PYTHON) tests/gpu/run.py

docs: $(STAMP) ## build the site of docs/ into out/site; broken links, missing and unlisted pages fail
	@$(BIN)/python .ci/check_links.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lock: $(STAMP) ## make the locks again from requirements/cpu.in (UPGRADE=1: newest versions)
	@for version in 3.11 3.12; do \
	  lock=requirements/cpu-py$${version/./}.txt; \
	  $(BIN)/python requirements/lock.py $$version $(if $(UPGRADE),--upgrade) > $$lock.new && mv $$lock.new $$lock && echo "made $$lock" || exit 1; \
	done

dev: ## a small .venv, without vLLM, torch and Triton: enough for check, test-fast and test-agent (a minute)
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	@touch .venv/.dev

clean: ## remove all that the other targets made: .venv, .models, out, caches
	rm -rf .venv .models out .runtime .pytest_cache .mypy_cache .ruff_cache *.egg-info

.venv/.dev:

$(STAMP):
	@bash requirements/setup.sh $(PYTHON) $(LOCK) $@
