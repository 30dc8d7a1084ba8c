# `make demo` and `make test` each set up everything on a fresh machine with Python 3.10 or newer, then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --num_cpu_threads_per_process $(CORES) \
	--mixed_precision no --dynamo_backend no

.PHONY: demo test test-slow chaos bench wheel lint cifar100-lt clean

demo: $(VENV)/ready
	$(LAUNCH) train.py --method ce --experiment demo_ce --overwrite
	$(LAUNCH) train.py --method reslt --experiment demo_reslt --overwrite
	@echo
	@$(BIN)/python -m reslt.report --side-by-side output/demo_ce output/demo_reslt

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n logical --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -n logical --dist loadfile -m slow

# Runs that are killed, damaged, signaled or out of disk space must end as if nothing had happened. A quarter of an hour.
chaos: $(VENV)/ready
	$(BIN)/python -m tests.chaos

# Speed ratios and their limits: step, loader, AutoAugment, inference, whole runs. Under five minutes on two idle CPU cores.
bench: $(VENV)/ready
	$(BIN)/python -m tests.benchmarks

# Builds the wheel and uses it in two fresh environments: the lowest versions that the requirements admit, and the newest.
# Downloads several GB. With `--suite` in addition, `python -m tests.fresh_environment` also runs the tests there.
wheel: $(VENV)/ready
	$(BIN)/python -m tests.fresh_environment lowest newest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The CIFAR-100-LT 0.01 rows over three seeds: 200 epochs each, for a GPU. If interrupted, run it again to resume.
cifar100-lt: $(VENV)/ready
	$(BIN)/python -m reslt.reproduce --recipes cifar100_lt_0.01/resnet32 cifar100_lt_0.01/resnet32_ce --seeds 0 1 2 --jobs 3

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is required; choose one with: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) output
