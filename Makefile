# make quickstart   from SmolLM2-135M to a fitted L(N, k)
# make test         the test suite, without its slow, chaos and network tiers (tests/README.md)
# make test-all     all of it
# make bench        the benchmarks of tests/benchmarks, one after another (about half an hour; needs the store of quickstart --recipe full)
# make soak         a sweep under random kills, beside the same undisturbed (about 20 minutes)
# make lint         ruff and mypy

PYTHON ?= python3
BIN := .venv/bin
# Tests that share what takes long to make stay together; all others go to whichever process is free.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadgroup

.PHONY: quickstart test test-all bench soak lint install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/saescale quickstart $(ARGS)

test: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not chaos and not network" $(ARGS)

test-all: install
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

bench: install
	for name in $(or $(BENCH),step architectures auxk pack quality stream growth overhead); do $(BIN)/python -m tests.benchmarks.bench_$$name $(ARGS) || exit; done

soak: install
	$(BIN)/python -m tests.benchmarks.soak $(ARGS)

# mypy finds a package where it lies: it gets a folder in which the floors lie below saescale/, as they are imported.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/lint/saescale
	ln -sfn $(addprefix $(CURDIR)/,$(wildcard saescale/*.py) storage scaling trainers cluster) build/lint/saescale/
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
