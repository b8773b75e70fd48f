# Each of these works as the first command after a fresh clone.

PYTHON ?= python3
ROUNDS ?= 15
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 --requirement
CHECKED := $(wildcard willi.py demo.py release.py) willi_lib bench tests

.DEFAULT_GOAL := help
.PHONY: help venv demo check test bench release lock install clean

help:
	@echo "make demo    two upstream servers and Willi in between: see mail being routed (Ctrl-C ends it)"
	@echo "make check   ruff, mypy --strict and the unit tests: seconds"
	@echo "make test    everything, with real servers; as root it installs those that are missing"
	@echo "make bench   Willi, nginx mail and HAProxy side by side, about 3 minutes: a table, bench/results.json and .svg;"
	@echo "             make bench BENCH=\"plain tlsc\" ROUNDS=5 is shorter; see docs/performance.md"
	@echo "make release release/willi-<version>.tar.gz of what is committed, with all that it needs, and release/SHA256SUMS"
	@echo "make install TARGET_HOST=root@mx1.example.org"
	@echo "             the same, and its install.sh run on that host, over ssh; SSH_OPTIONS=\"-p 2222 ...\" are passed on"
	@echo "make lock    after a change of requirements.txt: the wheels of a release, wheels.sha256"
	@echo "make venv    only the virtual environment, $(VENV)"
	@echo "make clean   remove what the others made"
	@echo
	@echo "PYTHON=python3.12 make ... chooses another Python (3.10 to 3.13)."

venv: $(VENV)/installed

# Made anew when the requirements change. A half-made one has no `demo` and is thrown away.
$(VENV)/demo: requirements.txt requirements-demo.txt
	@tests/ensure-venv.sh "$(PYTHON)"
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) requirements-demo.txt
	@touch $@

# What only the tests and checks need is six times as much.
$(VENV)/installed: $(VENV)/demo requirements-dev.txt
	@echo "Adding what the tests need ..."
	@$(PIP) requirements-dev.txt
	@touch $@

demo: $(VENV)/demo
	@$(BIN)/python demo.py

check: venv
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/mypy --strict $(CHECKED)
	@$(BIN)/python -m pytest --quiet --ignore=tests/e2e --ignore=tests/fuzz

test: venv
	@tests/install-packages.sh tests/e2e/packages.txt
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/mypy --strict $(CHECKED)
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile

bench: $(VENV)/demo
	@tests/install-packages.sh bench/packages.txt
	@$(BIN)/python -m bench --rounds $(ROUNDS) $(BENCH)

release:
	@tests/ensure-venv.sh "$(PYTHON)"
	@$(PYTHON) release.py build

lock:
	@tests/ensure-venv.sh "$(PYTHON)"
	@$(PYTHON) release.py lock

install:
	@tests/ensure-venv.sh "$(PYTHON)"
	@$(PYTHON) release.py install -- "$(TARGET_HOST)"

clean:
	rm -rf $(VENV) release .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
