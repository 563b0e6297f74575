# Everything sets itself up: `make demo` and `make test` need only Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test chaos audit fuzz lint protos bench bench-peers wheel clean

demo: $(READY)
	$(BIN)/choral demo --out out

test: $(READY)
	$(BIN)/pytest tests -n 2 --dist worksteal

# More seeds than `make test`: make chaos SEEDS=1000-1099
SEEDS ?= 100-199
chaos: $(READY)
	CHORAL_CHAOS_SEEDS=$(SEEDS) $(BIN)/pytest tests/e2e/test_chaos.py

# Looks for clients in what is released under differential privacy, longer than `make test` does; a broken promise is an error.
audit: $(READY)
	$(BIN)/choral privacy audit --noise 1 --canaries 10000
	$(BIN)/choral privacy audit --noise 1 --canaries 10000 --source discrete
	$(BIN)/choral privacy audit --noise 1 --canaries 2000 --source skellam
	$(BIN)/choral privacy audit --noise 1 --canaries 10000 --source local
	$(BIN)/choral privacy audit --noise 8 --rounds 40 --canaries 2000

# Hostile bytes, guided by coverage where atheris is installed (CPython on Linux x86-64), shared by all decoders: make fuzz FUZZ_S=60
FUZZ_S ?= 600
fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_S)

# Reinstalls only when what is to be installed has changed.
$(READY): pyproject.toml deploy/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Choral needs Python 3.11 or later; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/released.binpb

# Regenerate the stubs, and take the contract as it is now for the one that later changes must not break.
protos: $(READY)
	$(BIN)/buf lint
	test ! -e protos/released.binpb || $(BIN)/buf breaking --against protos/released.binpb
	protos/generate.sh
	$(BIN)/buf build --exclude-source-info -o protos/released.binpb

# Under ten minutes on two cores.
bench: $(READY)
	$(BIN)/python benchmarks/rounds.py --clients 2
	$(BIN)/python benchmarks/rounds.py --clients 10
	$(BIN)/python benchmarks/rounds.py --clients 2 --params 25000000 --rounds 5
	$(BIN)/python benchmarks/memory.py --clients 2 16 --rounds 1
	$(BIN)/python benchmarks/rounds.py --durability
	$(BIN)/python benchmarks/stragglers.py
	$(BIN)/python benchmarks/uploads.py
	$(BIN)/python benchmarks/flood.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/sessions.py

# The same work on Flower and NVFlare, which are installed in virtual environments of their own: make bench-peers ROWS=all
ROWS ?= small-2 100mb-2
bench-peers: $(READY)
	$(BIN)/python benchmarks/peers.py --rows $(ROWS)

wheel: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-protos dist out
