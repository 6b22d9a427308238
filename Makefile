# make reports            all notebooks at profile tiny, HTML, index page
#   PROFILE=paper         another folder of params/
#   ONLY=03               only this notebook (and what it needs, if that is out of date)
#   SINGLE=1              also each report as one self-contained HTML file, to mail
# make ledger             reports/PROFILE_ledger.md, which is committed, from a run of all notebooks (a run leaves it alone)
# make preflight PROFILE=paper   what that would need and what would fail, before the first download
#   GPU=a100              on another GPU (mmsae_helpers/suite/preflight.yaml lists them); TFLOPS=350 if you measured it, TFLOPS=here to measure now
# make test               the tests;  make hygiene: format, lint, no stored outputs
# make lab                JupyterLab on the notebooks
# Each makes .venv when it is missing or older than the pins; python3 and make are all it needs.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PROFILE ?= tiny
ONLY ?=
SINGLE ?=
GPU ?= h100
TFLOPS ?=
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

# idle OpenMP threads sleep: spinning ones slow small kernels down several times beside a busy neighbour
export OMP_WAIT_POLICY = PASSIVE

.PHONY: reports ledger preflight test lab hygiene env
reports: $(STAMP)
	$(BIN)/python -m mmsae_helpers.suite.runner --profile "$(PROFILE)" --only "$(ONLY)" $(if $(SINGLE),--single)

ledger: $(STAMP)
	$(BIN)/python -m mmsae_helpers.suite.runner --profile "$(PROFILE)" --ledger

preflight: $(STAMP)
	$(BIN)/python -m mmsae_helpers.suite.preflight --profile "$(PROFILE)" --gpu "$(GPU)" $(if $(TFLOPS),--tflops "$(TFLOPS)") $(ONLY)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks

hygiene: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

env: $(STAMP)

# torch first, by itself: on a machine that has its wheel at hand pip then takes that one
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python 3.11 or newer is needed; make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
