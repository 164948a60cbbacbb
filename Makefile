# Every command for people and CI. PYTHON may name any Python from 3.11 on.
PYTHON ?= python3
BIN := .venv/bin
COMPILE := $(BIN)/uv pip compile -q --upgrade --universal --generate-hashes --python-version 3.11 --no-annotate --no-header
# Tests that need neither a server nor a trained model, less those that draw millions of numbers.
FAST := $(addprefix tests/test_,imports.py noise.py scheduler.py client_arguments.py data.py packaging.py) \
	-k 'not ten_million'

.PHONY: serve test test-fast check check-wheel fix train export bench gpu-check lock clean

serve: .venv/service ## serve the models in artifacts/ on port 8000
	$(BIN)/reparam serve $(ARGS)

test: .venv/all ## run every test
	$(BIN)/pytest --cov --cov-report=term

test-fast: .venv/all ## run the tests that take seconds
	$(BIN)/pytest -q $(FAST)

check: .venv/all ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check-wheel: .venv/all ## install the wheel into empty environments and use it there; minutes, and it downloads
	BUILDER=$(BIN)/python PYTHON=$(PYTHON) tests/packaging.sh

fix: .venv/all ## format, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: .venv/all ## train a VAE: make train ARGS="gaussian --data digits --out runs/digits"
	$(BIN)/reparam train $(ARGS)

export: .venv/all ## evaluate, publish, inspect, verify: make export ARGS="publish runs/digits --name digits"
	$(BIN)/reparam $(ARGS)

bench: .venv/all ## measure beside other servers; needs wrk: make bench ARGS="throughput --seconds 5"
	$(BIN)/python -m benchmarks $(or $(ARGS),all)

# Does not make the environment of the other targets. It needs pytest and the packages of the extra `export`.
gpu-check: export REPARAM_DEVICE = cuda
gpu-check: ## test, then time, what runs on a GPU; fails where there is none
	@$(PYTHON) -m pytest -q --noconftest -p no:cacheprovider tests/test_graphs.py; tested=$$?; \
	$(PYTHON) -m benchmarks device --seconds 3 && exit $$tested

lock: .venv/all ## pin, with hashes, what the image is built from and runs on
	$(COMPILE) pyproject.toml --extra serve -c requirements/pins.txt -o requirements/service.txt
	$(COMPILE) pyproject.toml --extra cuda -c requirements/service.txt -o requirements/cuda.txt
	$(COMPILE) --group build -c requirements/service.txt -o requirements/build.txt

clean: ## remove the environment, builds and caches
	rm -rf .venv .bench build dist .*_cache .hypothesis .coverage* *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The serving set comes from the lock: the same versions as in the image, each checked against its hash. The package
# itself is a link to this folder, so that a changed or a new file needs no installation.
.venv/service: requirements/service.txt requirements/build.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade 'pip>=25.1'
	$(BIN)/pip install -q --require-hashes -r requirements/service.txt -r requirements/build.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

.venv/all: .venv/service requirements/pins.txt pyproject.toml
	$(BIN)/pip install -q --no-build-isolation -e '.[serve,export]' --group dev -c requirements/pins.txt
	touch $@
