# Every target stands alone on a fresh machine: the first one makes the environment.
# `make demo` and `make test` are all that a new user needs.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test test-cluster test-all lint format mlflow-stop clean

demo: $(STAMP)  ## the whole chain on photographs that ship with scikit-image
	$(PYTHON) jobs/run.py configs/demo.yaml

test: $(STAMP)  ## what to run before each commit: at most five minutes on two cores
	$(PYTHON) -m pytest

lint: $(STAMP)  ## what ruff and mypy say; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## format and sort what can be
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

test-cluster: $(STAMP)  ## several Ray nodes on this machine; says what it had to skip
	$(PYTHON) -m pytest -m "cluster and not slow" -rs

test-all: $(STAMP)  ## every test: jobs, Ray, MLflow servers, faults, the slow ones
	$(PYTHON) -m pytest -m ""

mlflow-stop: $(STAMP)  ## ends the MLflow server that a job started
	$(PYTHON) -c 'from pathlib import Path; from pipeline.track import server; server.stop(Path("runs/mlflow"))'

clean:  ## removes the environment; runs/ holds trained weights and stays
	rm -rf $(VENV)

# uv where it is there, pip where it is not
$(STAMP): pyproject.toml constraints.txt
	@echo "making the environment in $(VENV): some gigabytes, for minutes without a word"
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python '>=3.11,<3.14' $(VENV) && \
	  uv pip install --quiet --python $(PYTHON) -c constraints.txt -e '.[dev,compat]'; \
	else \
	  python3 -m venv $(VENV) && \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,compat]'; \
	fi
	@touch $(STAMP)
