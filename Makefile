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

.PHONY: help demo test check bench soak gpu docs lock clean

help: ## these lines
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(STAMP) ## real Triton, vLLM and swap agent on a simulated device: TTFT cold, swapped, warm (7 minutes)
	@$(BIN)/python -m loadtest.demo

test: $(STAMP) ## the suite: unit, agent, engine, e2e (15 minutes)
	@$(BIN)/python -m loadtest.models
	@bash .ci/tiers unit agent engine e2e

check: $(STAMP) ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(STAMP) ## speed, as JSON, tables and a plot under out/ (three quarters of an hour)
	@$(BIN)/python -m loadtest.bench

soak: $(STAMP) ## half an hour of mixed load, 10,000 swap cycles, and what is too slow for the suite; fails on the first lost request
	@TRITON_SWAP_SOAK=1 $(BIN)/python -m pytest -q tests/unit/test_policy_machine.py
	@TRITON_SWAP_SOAK=1 $(BIN)/python -m pytest -q tests/agent/test_rank_link.py tests/agent/test_cuda_device.py tests/agent/test_gpu_probe.py
	@TRITON_SWAP_SOAK=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/engine/test_model_families.py tests/engine/test_engine_kv.py tests/e2e/test_bursts.py
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

clean: ## remove all that the other targets made: .venv, .models, out, caches
	rm -rf .venv .models out .runtime .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(STAMP):
	@bash requirements/setup.sh $(PYTHON) $(LOCK) $@
