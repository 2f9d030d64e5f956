# make quickstart   install and run the whole loop on embedded data (minutes, offline after install)
# make test         linters, types, import contract, tests
# make test-slow    what takes longer: every tensor of every checkpoint format, the whole catalogue
# make test-faults  kills, damage and hostile files (docs/reliability.md): at most half an hour
# make test-soak    20,000 steps in which memory, handles, threads and disk stay flat: a quarter hour
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint unit unit-parts unit-whole test-slow test-faults test-soak test-gpu constraints clean

quickstart: $(STAMP)
	@if [ -e runs/quickstart ]; then echo "removing the last quickstart's runs/quickstart"; fi
	rm -rf runs/quickstart
	$(BIN)/featdistill quickstart --out runs/quickstart

test: lint unit

lint: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

# two halves side by side, of about the same length, one thread each
UNIT := OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow and not gpu and not faults and not soak"
HALF := $(addprefix tests/,models evaluation diagnostics data core cli config objectives report engine faults)

unit: $(STAMP)
	@$(MAKE) --no-print-directory -j2 unit-parts unit-whole

unit-parts: $(STAMP)
	$(UNIT) $(HALF)

unit-whole: $(STAMP)
	$(UNIT) tests $(HALF:%=--ignore=%)

test-slow: $(STAMP)
	$(BIN)/pytest -q -m "slow and not gpu and not faults and not soak"

test-faults: $(STAMP)
	$(BIN)/pytest -q tests/faults

test-soak: $(STAMP)
	$(BIN)/pytest -q tests/soak

test-gpu: $(STAMP)
	$(BIN)/pytest -q -m gpu

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"featdistill needs Python 3.11 or 3.12; {sys.executable} is {v[0]}.{v[1]} (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# after changing dependencies: the versions that are installed now become the pinned ones
constraints: $(STAMP)
	{ echo '# Versions that the tests ran with (make constraints). No index is named here.'; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude featdistill; } > constraints.txt

clean:
	rm -rf $(VENV) runs
