# install, demo, test and lint; each makes .venv by itself. PIP_EXTRA_INDEX_URL and the other variables of pip are honoured.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test fuzz kills rtx test-gpu lint dvc.yaml docs clean
install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	$(BIN)/python -c "from pathlib import Path; from evaluation.device import write; write(Path('outputs/cache/device.json'))"
	touch $@

demo: install
	$(BIN)/python -m pipeline --multirun experiment=demo pruner=none,l1 precision=fp32,int8
	@echo
	@echo "The report: outputs/demo/report/report.html   The table: outputs/demo/report/results.csv"
	@echo "Compare the runs: $(BIN)/mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"

# In the order that tests/conftest.py gives: what takes longest begins.
test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Parsers of what users give, with 10,000 examples each; `make test` tries 200.
fuzz: install
	POSEPRESS_FUZZ=1 $(BIN)/python -m pytest -n auto -o faulthandler_timeout=0 $$(find tests -name "test_fuzz_*.py")

# Ends a smoke chain at 300 random moments and compares its results; `make test` at 3. The same command goes on where it was stopped.
kills: install
	PYTHONPATH=. $(BIN)/python tests/chains/kills.py

# Parses and builds our files with TensorRT for RTX, which installs on Linux and x86-64 and needs no GPU to build.
rtx: install
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation -c requirements-rtx.lock -e .[tensorrt-rtx]
	POSEPRESS_REQUIRE_RTX=1 $(BIN)/python -m pytest -n auto -m rtx

# For a machine with a GPU and TensorRT: builds, compares, and prints a certificate.
test-gpu: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .[tensorrt]
	PYTHONPATH=. $(BIN)/python tests/gpu/certify.py
	$(BIN)/python -m pytest tests/pipeline/training/test_training.py -k on_a_gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*

# The source files that each stage of dvc.yaml runs, by the function that makes fingerprints.
dvc.yaml: install
	PYTHONPATH=. $(BIN)/python tests/pipeline/launch/test_dvc.py

# The reference of options, from signatures and docstrings.
docs: install
	PYTHONPATH=. $(BIN)/python docs/generate.py

clean:
	rm -rf .venv outputs
