PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt

.PHONY: quickstart test test-slow lint types bench bench-peers clean

$(BIN)/steer: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

quickstart: $(BIN)/steer
	$(BIN)/steer models fetch smollm2-135m
	$(BIN)/steer run quickstart

test: $(BIN)/steer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

test-slow: $(BIN)/steer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(BIN)/steer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders adapters/ and recipes/ are installed under steer/, which a type checker sees only in an installed copy.
types: $(BIN)/steer
	rm -rf build/types && mkdir -p build/types
	cp -r steer build/types/steer && cp -r adapters build/types/steer/adapters && cp -r recipes build/types/steer/recipes
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p steer

bench: $(BIN)/steer
	$(BIN)/steer models fetch smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m steer.bench

clean:
	rm -rf $(VENV) .venv-* out build dist *.egg-info
