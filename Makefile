# Every command a person or CI runs. PYTHON may name any Python from 3.11 on.
PYTHON ?= python3
BIN := .venv/bin
COMPILE := $(BIN)/uv pip compile -q --upgrade --universal --generate-hashes --python-version 3.11 --no-annotate --no-header

.PHONY: serve test check fix train export bench gpu-check lock clean

serve: .venv/service ## serve the models in artifacts/ on port 8000
	$(BIN)/python -m reparam serve

test: .venv/all ## run every test
	$(BIN)/pytest --cov --cov-report=term

check: .venv/all ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: .venv/all ## format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: .venv/all ## train a VAE: make train ARGS="gaussian --data digits --out runs/digits"
	$(BIN)/python -m reparam train $(ARGS)

export: .venv/all ## evaluate, publish, inspect, verify: make export ARGS="publish runs/digits --name digits"
	$(BIN)/python -m reparam $(ARGS)

bench: .venv/all ## measure beside other servers; needs wrk: make bench ARGS="throughput --seconds 5"
	$(BIN)/python -m benchmarks $(or $(ARGS),all)

# Without the environment of the other targets: of that it needs onnxruntime-gpu, scipy, pillow, pydantic-settings, torch,
# onnx, safetensors, scikit-learn, tqdm and pytest.
gpu-check: export REPARAM_DEVICE = cuda
gpu-check: ## test, then time, what runs on a GPU; fails where there is none
	@$(PYTHON) -m pytest -q --noconftest -p no:cacheprovider tests/test_graphs.py; tested=$$?; \
	$(PYTHON) -m benchmarks device --seconds 3 && exit $$tested

lock: .venv/all ## pin what the service runs on, with hashes, after a change of the dependency groups
	$(COMPILE) --group service -o requirements/service.txt
	$(COMPILE) --group cuda -c requirements/service.txt -o requirements/cuda.txt

clean: ## remove the environment and what tools left behind
	rm -rf .venv .bench build dist .*_cache .hypothesis .coverage* *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The serving set comes from the lock: the same versions as in the image, each checked against its hash.
.venv/service: requirements/service.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade 'pip>=25.1'
	$(BIN)/pip install -q --require-hashes -r requirements/service.txt
	touch $@

.venv/all: .venv/service pyproject.toml
	$(BIN)/pip install -q -e . --group train --group dev
	touch $@
