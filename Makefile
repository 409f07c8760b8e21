# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data/phantom
RUN ?= runs/quickstart

SELENIUM := selenium==4.51.0

.PHONY: quickstart test test-faults test-report bench lint format clean

quickstart: $(VENV)/.installed
	@test -f $(DATA)/manifest.json || $(BIN)/python -m selfreg_jax.data.prepare --dataset=phantom --output=$(DATA)
	$(BIN)/python train.py --config=configs/quickstart.py --config.data.dir=$(DATA) --workdir=$(RUN)
	$(BIN)/python eval.py --workdir=$(RUN)
	@echo
	@echo "pictures: $(RUN)/eval/test/overlays/*.png (cases), $(RUN)/curves.png (training), $(RUN)/panels/ (validation)"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2

# Kills, damages, starves and stops real runs (docs/reliability.md): tens of minutes; not part of `test`.
test-faults: $(VENV)/.installed
	$(BIN)/python -m pytest -q tests/faults

# Opens made-up evaluations' report.html in headless Chromium; not part of `test`.
test-report: $(VENV)/.installed
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { echo "error: Chromium and its driver are needed: apt-get install chromium chromium-driver"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(SELENIUM)
	$(BIN)/python -m pytest -q tests/browser

# The short forms, on the CPU: they show that every comparison runs, not how it comes out. Tests that need PyTorch or
# medpy run here only.
bench: $(VENV)/.installed-benchmarks
	$(BIN)/python -m pytest -q tests/benchmarks
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.train_step --short
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.regularization_cost --short
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.input_pipeline --short
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.surface_metrics --short
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.volume_inference --short
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.startup --short
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.scaling --short

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name yours: make PYTHON=/path/to/python3 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# For PyTorch's small build for the CPU, or another one, install it into .venv first.
$(VENV)/.installed-benchmarks: $(VENV)/.installed benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@
