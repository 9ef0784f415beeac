# make help lists the targets. A fresh clone needs Python 3.11 and a C++ compiler (for torch.compile); no more.
#
# The pinned set runs on a CPU. Where the package index serves the CUDA build of PyTorch first (as on Linux it does
# unless told otherwise), gigabytes can be saved: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels before
# `make install`. For GPUs: `make install BUILD=cuda`, in a fresh VENV.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BUILD ?= cpu
CONFIG ?= launch/runs/deepfm.toml
RANKS ?= 2
WORKERS ?= 2
SAMPLE := data/sample
SET ?=

TORCHREC := 1.8.0
STAMP := $(VENV)/installed
# TorchX's local scheduler looks for torchrun on PATH.
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: help install train test test-faults test-slurm test-hosts test-browser lint clean distclean
.DEFAULT_GOAL := help

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP) ## make .venv with the pinned versions (BUILD=cpu or cuda, PYTHON=...)

# TorchRec requires the CUDA build of FBGEMM by name, and that would overwrite the CPU build: so no dependencies for it
# (pyproject.toml lists its others).
$(STAMP): pyproject.toml Makefile
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'shardrec needs Python 3.11 or newer, found "$(PYTHON)"; set PYTHON=/path/to/python3.11' >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(VENV)/bin/pip" install -e '.[$(BUILD),test]'
	"$(VENV)/bin/pip" install --no-deps torchrec==$(TORCHREC)
	$(RUN) python -m trainer doctor
	@touch $@

train: install $(SAMPLE)/sample.json ## train DeepFM on made data on two ranks (CONFIG=..., RANKS=n, SET="key=value ...")
	COLUMNS="$$(tput cols 2>/dev/null || echo 80)" $(RUN) torchx --log_level WARNING run -s local_cwd launch/components.py:train \
	  --config $(CONFIG) -j 1x$(RANKS) -- $(foreach override,$(SET),'--set=$(override)')

$(SAMPLE)/sample.json: | $(STAMP)
	"$(VENV)/bin/python" -m trainer sample-data $(SAMPLE) --rows 1000000 --seed 1

lint: install ## check style, format and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

test: lint ## check everything, then run all tests (WORKERS=n processes, files of tests in turn)
	$(RUN) pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-faults: install ## do hundreds of faults to runs, print how many they survived (ten minutes; `make test` does a sample)
	SHARDREC_FAULTS=full $(RUN) pytest tests/faults

test-slurm: install ## run jobs on a real Slurm of two nodes on this machine (root; says which Debian packages it lacks)
	$(RUN) pytest -s tests/slurm/test_slurm.py

test-hosts: install ## run one job on two hosts and cut the link between them (root; network namespaces)
	$(RUN) pytest -s tests/slurm/test_hosts.py

test-browser: install ## look at a page of `report` in Chromium, light and dark, wide and narrow (Debian's chromium)
	$(RUN) pytest -s tests/browser

clean: ## remove what tools left behind; keeps .venv, data, runs and logs
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment and the sample data as well
	rm -rf "$(VENV)" "$(SAMPLE)" logs
