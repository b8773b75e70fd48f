# Each of these works as the first command after a fresh clone.

PYTHON ?= python3
ROUNDS ?= 15
SECONDS ?= 300
INPUTS ?= 100000
SEED ?=
MINUTES ?= 30
IDLE ?= 5000
SLOW ?= 500
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 --requirement
# A run of tests with an end. A worker that dies is replaced as often as it takes.
TESTS := $(BIN)/python -m tests.runner --dist loadfile --max-worker-restart 1000
PYTEST ?=
E2E ?= tests/e2e
CHAOS_MINUTES = $(shell expr $(SECONDS) / 60 + 15)
# Tests start Willi a thousand times: without kept bytecode each start compiles all of it, a third of its CPU time.
unexport PYTHONDONTWRITEBYTECODE
CHECKED := $(wildcard willi.py demo.py release.py) willi_lib bench tests

.DEFAULT_GOAL := help
.PHONY: help venv demo check test e2e test-pythons chaos fuzz bench load soak release lock install clean

help:
	@echo "make demo    two upstream servers and Willi in between: see mail being routed (Ctrl-C ends it)"
	@echo "make check   ruff (rules and format), mypy --strict and the unit tests: seconds"
	@echo "make test    everything, with real servers; as root it installs those that are missing; MINUTES=60: an hour at most"
	@echo "make e2e     the tests with whole Willis alone; what is missing is left out, with the reason"
	@echo "make test-pythons"
	@echo "             \`make check\` and the tests of whole Willis that need no root, with each Python from 3.10 to 3.14 that"
	@echo "             is here; PYTHONS=\"3.10 3.13\" and E2E=tests/e2e/smtp/test_starttls.py choose some"
	@echo "make chaos   mail goes through Willi while everything breaks; SECONDS=3600 is longer, SEED=7 draws the same again;"
	@echo "             as root it installs the servers that are missing"
	@echo "make fuzz    INPUTS=1000000 octets of strangers against the protocol code and whole sessions; SEED=7 as above"
	@echo "make bench   Willi, nginx mail and HAProxy side by side, about 3 minutes: a table, bench/results.json and .svg;"
	@echo "             make bench BENCH=\"plain tlsc\" ROUNDS=5 is shorter; see docs/performance.md"
	@echo "make load    normal traffic with and without IDLE=5000 idle and SLOW=500 slow clients beside it"
	@echo "make soak    Willi under full load for MINUTES=30: memory and descriptors, docs/soak.json and docs/soak.svg"
	@echo "make release release/willi-<version>.tar.gz of what is committed, with all that it needs, and release/SHA256SUMS"
	@echo "make install TARGET_HOST=root@mx1.example.org"
	@echo "             the same, and its install.sh run on that host, over ssh; SSH_OPTIONS=\"-p 2222 ...\" are passed on"
	@echo "make lock    after a change of requirements.txt: the wheels of a release, wheels.sha256"
	@echo "make venv    only the virtual environment, $(VENV)"
	@echo "make clean   remove what the others made"
	@echo
	@echo "PYTHON=python3.12 make ... chooses another Python (3.10 to 3.14)."

venv: $(VENV)/installed

# Made again when the requirements change. A half-made one has no `demo` and is removed.
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
	@$(BIN)/ruff check $(CHECKED) && $(BIN)/ruff format --check --quiet $(CHECKED)
	@$(BIN)/mypy --strict $(CHECKED) & types=$$!; \
	$(TESTS) --numprocesses 3 --minutes $(MINUTES) --quiet --ignore=tests/e2e --ignore=tests/fuzz --ignore=tests/chaos; tests=$$?; \
	wait $$types && exit $$tests

# In the order of tests/runner/plugin.py: the files that take longest come first. Many tests wait most of the time, so
# there are more processes than CPUs.
test: venv
	@tests/install-packages.sh tests/e2e/packages.txt
	@$(BIN)/ruff check $(CHECKED) && $(BIN)/ruff format --check --quiet $(CHECKED)
	@$(BIN)/mypy --strict $(CHECKED) & types=$$!; \
	CHAOS_SECONDS=60 $(TESTS) --numprocesses 6 --minutes $(MINUTES) --no-loadscope-reorder $(PYTEST); tests=$$?; \
	wait $$types && exit $$tests

e2e: venv
	@$(TESTS) --numprocesses 4 --minutes $(MINUTES) --quiet $(PYTEST) $(E2E)

test-pythons:
	@E2E="$(E2E)" tests/pythons.sh $(PYTHONS)

chaos: venv
	@tests/install-packages.sh tests/e2e/packages.txt
	@CHAOS_SECONDS=$(SECONDS) CHAOS_SEED=$(SEED) $(BIN)/python -m tests.runner --minutes $(CHAOS_MINUTES) --quiet --capture=no tests/chaos

fuzz: venv
	@$(BIN)/python -m tests.fuzz --inputs $(INPUTS) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/demo
	@tests/install-packages.sh bench/packages.txt
	@$(BIN)/python -m bench --rounds $(ROUNDS) $(BENCH)

load: $(VENV)/demo
	@$(BIN)/python -m bench.crowd --idle $(IDLE) --slow $(SLOW)

soak: $(VENV)/demo
	@$(BIN)/python -m bench.soak --minutes $(MINUTES)

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
	rm -rf $(VENV) .venvs release .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
